"""benchmarks/bench_trainer.py runs, and refuses to report on trainers that do not do the same."""

import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_trainer
import torch
import written
from bench_trainer import QUICK, Stepper, refuse_other_weights, stock
from side_by_side import Disagreement, measure
from trainer_rewards import spread

from core.train.language import LanguageTrainer


def test_quick_writes_a_well_formed_file(tmp_path, capfd):
    bench_trainer.main(["--quick", "--output", str(tmp_path)])
    cases = written.check(tmp_path / "trainer_overhead.json")
    assert [case["unit"] for case in cases] == ["ms/step"] * 2
    for case in cases:
        low, high = case["added_ci95"]
        assert low <= case["added"] <= high
    assert "'loss'" not in capfd.readouterr().out


def test_trainers_that_take_turns_end_as_one_that_runs_alone(tmp_path):
    steps = QUICK.rounds + 2
    alone = stock(QUICK, steps, tmp_path)
    torch.manual_seed(bench_trainer.SEED)
    alone.train()
    arms = {name: Stepper(stock(QUICK, steps, tmp_path)) for name in ("a", "b")}
    with arms["a"], arms["b"]:
        measure({name: arm.step for name, arm in arms.items()}, range(steps - 1))
    for arm in arms.values():
        refuse_other_weights([alone.model.state_dict(), arm.trainer.model.state_dict()])
    assert not torch.equal(alone.model.lm_head.weight, stock(QUICK, steps, tmp_path).model.lm_head.weight)


def test_another_reward_is_refused_and_leaves_no_trainer_running(tmp_path):
    before = threading.active_count()
    arms = {
        "a": Stepper(stock(QUICK, 9, tmp_path)),
        "b": Stepper(stock(QUICK, 9, tmp_path, reward=lambda text: spread(text[::-1]))),
    }
    with arms["a"], arms["b"], pytest.raises(Disagreement, match="round 0"):
        measure({name: arm.step for name, arm in arms.items()}, range(8))
    assert threading.active_count() == before
    assert arms["a"].trainer.state.global_step < 9


def test_an_error_in_a_trainer_s_thread_is_raised_where_its_step_was_asked_for(tmp_path):
    def fails(text):
        raise RuntimeError("no reward today")

    arm = Stepper(stock(QUICK, 9, tmp_path, reward=fails))
    with arm, pytest.raises(RuntimeError, match="no reward today"):
        arm.step(0)


def test_other_weights_are_refused_by_name():
    state = {"layer.weight": torch.zeros(2)}
    refuse_other_weights([state, {"layer.weight": torch.zeros(2)}])
    with pytest.raises(Disagreement, match=r"layer\.weight"):
        refuse_other_weights([state, {"layer.weight": torch.tensor([0.0, 1e-30])}])


def test_ours_is_the_language_trainer_and_stock_is_not(tmp_path):
    from core.scoring import Scorer

    with Scorer({"spread": bench_trainer.spread_of_batch}) as scorer:
        assert type(bench_trainer.ours(QUICK, 3, tmp_path, scorer)) is LanguageTrainer
    assert not isinstance(stock(QUICK, 3, tmp_path), LanguageTrainer)
