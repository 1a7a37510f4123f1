import math

import pytest
import torch

from core.train.health import STOP_AFTER, Guard, Health, NotFinite, finite_sampling

WELL = {
    "reward": 0.5,
    "loss": 1e-6,
    "grad_norm": 1.0,
    "zero_spread": 0.5,
    "truncated": 0.0,
    "unscored": 0.0,
    "entropy": 1.0,
    "ratio_deviation": 0.0,
}


def run(health: Health, steps: int, start: int = 1, **changed) -> list[str]:
    return [w for step in range(start, start + steps) for w in health.update(step, {**WELL, **changed})]


def verdicts(health: Health) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in health.block()}


def test_a_well_run_gives_no_warning_and_explains_its_zero_loss_once():
    health = Health()
    assert run(health, 50) == []
    assert [f.name for f in health.block() if f.verdict == "note"] == ["Loss at the start"]
    assert set(verdicts(health).values()) == {"ok", "note", "not measured"}


def test_no_spread_for_twenty_steps_is_said_once_and_again_only_after_it_was_gone():
    health = Health()
    assert run(health, 19, zero_spread=1.0) == []
    (warning,) = run(health, 10, start=20, zero_spread=1.0)
    assert "step 20: no group in the last 20 steps had different rewards: " in warning
    assert run(health, 25, start=30) == []
    assert verdicts(health)["Groups with spread"] == "ok"
    assert len(run(health, 30, start=55, zero_spread=1.0)) == 1


def test_no_spread_names_the_likely_cause():
    for changed, cause in (
        ({"rewards/x/mean": 0.0}, "every completion fails"),
        ({"rewards/x/mean": 1.0}, "already gets full reward"),
        ({"rewards/x/mean": 0.5}, "judged alike"),
        ({"unscored": 1.0, "reward": math.nan}, "no rollout could be judged, so nothing is learned"),
        ({"rewards/x/mean": 0.0, "truncated": 0.9}, "cut at the length limit"),
    ):
        assert any(cause in w for w in run(Health(), 20, zero_spread=1.0, **changed) if "no group" in w)


def test_truncation_unscored_and_nonfinite_numbers_warn():
    assert "60% of completions are cut" in run(Health(), 3, truncated=0.6)[0]
    assert "11% of rollouts could not be scored" in run(Health(), 3, unscored=0.11)[0]
    (warning,) = run(Health(), 3, grad_norm=math.inf)
    assert "not finite at 1 of the steps, first at step 1" in warning
    assert run(Health(), 3, truncated=0.5, unscored=0.09) == []


def test_first_ratio_is_checked_only_with_one_update_a_batch():
    assert "off 1 by 0.002" in run(Health(), 2, ratio_deviation=0.002)[0]
    assert run(Health(), 2, ratio_deviation=0.0009) == []
    several = Health(updates_per_batch=2)
    assert run(several, 2, ratio_deviation=0.3) == []
    assert verdicts(several)["First ratio"] == "not measured"


def test_collapsed_entropy_warns():
    health = Health()
    assert run(health, 5) == []
    assert run(health, 5, start=6, entropy=0.11) == []
    assert "entropy fell from 1 to" in run(health, 5, start=11, entropy=0.05)[0]


def test_reward_rising_while_the_metric_falls_warns_also_from_the_first_evaluation_on():
    health = Health("acc")
    health.update(0, {"eval/acc": 0.6, "eval/acc/lo": 0.55, "eval/acc/hi": 0.65})
    run(health, 20, reward=0.3)
    assert health.update(20, {"eval/acc": 0.56, "eval/acc/lo": 0.5, "eval/acc/hi": 0.6}) == []
    run(health, 20, start=21, reward=0.9)
    (warning,) = health.update(40, {"eval/acc": 0.5, "eval/acc/lo": 0.45, "eval/acc/hi": 0.55})
    assert "from 0.600 (step 0) to 0.500 (step 40) while the reward rose from 0.300 to 0.900" in warning
    lower = Health("error", better="lower")
    for step in range(4):
        lower.update(step, {"reward": 0.1 * step, "eval/error": 0.9 - 0.1 * step})
    assert verdicts(lower)["Reward against metric"] == "ok"


def test_a_resumed_run_reads_its_lines_again_and_does_not_repeat_a_warning():
    health, again = Health(), Health()
    assert len(run(health, 20, zero_spread=1.0)) == 1
    run(again, 20, zero_spread=1.0)
    assert again.block() == health.block()
    assert run(again, 10, start=21, zero_spread=1.0) == []


def test_missing_metrics_are_not_measured_and_never_an_error():
    health = Health()
    assert health.update(1, {"note": "text", "reward": math.nan}) == []
    assert all(f.verdict == "not measured" for f in health.block() if f.name != "Numbers")


def test_a_share_that_hovers_about_its_limit_warns_once():
    health = Health()
    assert len(run(health, 20, truncated=0.51)) == 1
    assert [run(health, 1, start=21 + i, truncated=share) for i, share in enumerate([0.0, 1.0, 0.0, 1.0])] == [[]] * 4


# -- the guard


def test_an_update_that_is_not_finite_is_refused_and_its_rows_are_kept_once():
    kept = []
    guard = Guard(lambda step, rows: kept.append((step, rows)))
    for step, norm in ((1, 1.0), (2, math.nan), (3, 0.0), (4, math.inf)):
        guard.note([{"row": step}] * (step in (1, 2)))
        guard.note([])
        assert guard.allows(step, norm) == math.isfinite(norm)
    assert kept == [(2, [{"row": 2}])], "rows of an update that passed, or of an earlier one"
    assert (guard.skipped, guard.in_a_row) == (2, 1)


def test_so_many_skipped_updates_in_a_row_end_the_run_and_fewer_do_not():
    guard = Guard()
    bad = [math.nan] * (STOP_AFTER - 1)
    for step, norm in enumerate([*bad, 1.0, *bad], 1):
        guard.allows(step, norm)
    assert guard.skipped == 2 * (STOP_AFTER - 1)
    with pytest.raises(NotFinite, match=r"the last 5 updates, to step 10, .* of inf .* those of step 5\. Lower optim"):
        guard.allows(2 * STOP_AFTER, math.inf)


def test_sampling_from_what_is_no_probability_is_said_in_plain_words():
    with pytest.raises(NotFinite, match=r"^step 3: nothing can be sampled"), finite_sampling("step 3"):
        torch.multinomial(torch.tensor([math.nan, 1.0]), 1)
    with pytest.raises(RuntimeError, match="size"), finite_sampling("step 3"):
        torch.ones(2) @ torch.ones(3)
