"""benchmarks/bench_flow_loop.py runs, its public loop is right, and it reports on nothing but the same mathematics."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_flow_loop as bench
import public_flow_loop
import torch
import written
from bench_flow_loop import QUICK, SETTINGS, SMALL
from public_flow_loop import NOISE_LEVEL, PublicLoop, Setting
from side_by_side import Disagreement

from core.policy.kernel import Kernel, log_prob

KL_ALONE = Setting("KL, no guidance", 1.0, 0.5)


@pytest.mark.slow
def test_quick_writes_a_well_formed_file(tmp_path):
    bench.main(["--quick", "--output", str(tmp_path)])
    cases = written.check(tmp_path / "flow_loop.json")
    assert len(cases) == 5
    assert all(case["difference"] < 1e-6 for case in cases[:4])
    rows, steps = 2 * QUICK.prompts * QUICK.group, QUICK.steps
    trained = steps - 1
    published, plain = (cases[i]["profile"] for i in (0, 2))
    assert published["baseline"]["rows"] == {
        "without_gradient": rows * (2 * steps + 2 * trained),  # sampled, and the reference; each with guidance
        "with_gradient": rows * 2 * trained,
    }
    assert published["ours"]["rows"] == {
        "without_gradient": rows * (2 * steps + 2 * trained + trained),  # the empty prompt's half needs no gradient
        "with_gradient": rows * trained,
    }
    for side in ("ours", "baseline"):
        assert plain[side]["rows"] == {"without_gradient": rows * steps, "with_gradient": rows * trained}
        assert 0.3 < plain[side]["share_in_net"] < 1
    assert cases[4]["profile"]["ours"]["rows"] == {"without_gradient": rows * (4 + 2), "with_gradient": rows * 4}


@pytest.mark.parametrize("setting", [*SETTINGS, KL_ALONE], ids=lambda setting: setting.name)
def test_both_sides_learn_the_same_from_the_same_rollouts(setting, tmp_path):
    assert bench.difference(SMALL, setting, tmp_path) < 1e-6


def test_another_limit_of_the_advantages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(public_flow_loop, "LIMIT", 0.5)
    with pytest.raises(Disagreement, match="no guidance, no KL"):
        bench.difference(SMALL, SETTINGS[1], tmp_path)


def test_another_guidance_of_the_trained_pass_is_refused(tmp_path, monkeypatch):
    velocity = PublicLoop._velocity
    monkeypatch.setattr(PublicLoop, "_velocity", lambda *args: 1.0001 * velocity(*args))
    with pytest.raises(Disagreement, match="as published"):
        bench.difference(SMALL, SETTINGS[0], tmp_path)


def test_an_iteration_of_ours_is_a_generation_batch_and_its_two_updates(tmp_path):
    rows = 2 * QUICK.prompts * QUICK.group
    with bench.Ours(QUICK, SETTINGS[1], tmp_path, micro_steps=1) as arm:
        for done in (2, 4):
            profile = bench.profile(arm.iteration)
            assert arm.trainer.state.global_step == done
            assert profile["rows"] == {
                "without_gradient": rows * QUICK.steps,
                "with_gradient": rows * (QUICK.steps - 1),
            }
            assert 0 < profile["share_in_net"] < 1
    assert arm.ended


def test_the_public_step_is_the_flow_kernel():
    public = PublicLoop(QUICK, SETTINGS[1], QUICK.net())
    x, v = torch.randn(2, 3, 3, 4, 4).unbind()
    for timestep in public.scheduler.timesteps:
        torch.manual_seed(0)
        after, logp, mean, _ = public._step(v, timestep[None], x)
        at = public.scheduler.index_for_timestep(timestep)
        kernel_mean, std = Kernel("flow", NOISE_LEVEL).step(x, v, *public.sigmas[at : at + 2].tolist())
        torch.testing.assert_close(mean, kernel_mean)
        torch.testing.assert_close(logp, log_prob(after, kernel_mean, std))
        torch.manual_seed(0)
        torch.testing.assert_close(after, kernel_mean + std * torch.randn_like(x))


def credited(rewards, prompts):
    count = len(rewards)
    samples = {"prompts": prompts, "rewards": torch.tensor(rewards), "given": {"row": torch.arange(count)}}
    return PublicLoop(QUICK, SETTINGS[1], QUICK.net()).credited({**samples, "logps": torch.zeros(count, 3)})


def test_advantages_of_the_worked_example():
    made = credited([1.0, 10.0, 2.0, 10.0, 3.0, 10.0, 4.0, 14.0], ["a", "b"] * 4)
    expected = [-0.33384150027, -0.22256100018, -0.11128050009, -0.22256100018]
    expected += [0.11128050009, -0.22256100018, 0.33384150027, 0.667683000539]
    assert made["advantages"].shape == (8, 3)
    for step in made["advantages"].T:
        assert step.tolist() == pytest.approx(expected)


def test_rows_without_advantage_are_dropped_and_halves_stay_whole():
    made = credited([1.0, 5.0, 2.0, 5.0, 6.0, 5.0], ["a", "b"] * 3)
    assert made["given"]["row"].tolist() == [0, 1, 2, 4]  # all of a's, and one of b's: the number stays even
    made = credited([1.0, 5.0, 2.0, 5.0, 3.0, 5.0], ["a", "b"] * 3)
    assert made["given"]["row"].tolist() == [0, 4]  # row 2 lies at its group's mean
    assert len(made["advantages"]) == 2


def test_an_iteration_of_the_public_loop_is_two_updates_and_the_average_follows_every_eighth():
    with bench.ThreadPoolExecutor() as pool:
        public = PublicLoop(QUICK, SETTINGS[1], QUICK.net(), pool)
        start = [p.detach().clone() for p in public.weights]
        for done in range(2, 8, 2):
            assert public.iteration() == 2
            assert public.updates == done
            assert all(torch.equal(a, b) for a, b in zip(public.averaged, start, strict=True))
        public.iteration()
    changed = [not torch.equal(a, b) for a, b in zip(public.averaged, start, strict=True)]
    assert sum(changed) > 0.8 * len(changed)
    assert public.info["loss"] == pytest.approx(0, abs=0.1)
    assert public.info["reward"] != 0


def test_a_loop_s_size_decides_its_batches():
    with bench.ThreadPoolExecutor() as pool:
        samples = PublicLoop(replace(QUICK, prompts=2, group=3), SETTINGS[1], QUICK.net(), pool).sample()
    assert samples["latents"].shape == (12, 6, 3, 8, 8)
    assert torch.equal(samples["latents"][:, 1:], samples["next_latents"][:, :-1])
    assert samples["logps"].shape == samples["timesteps"].shape == (12, 6)
    for half in (samples["prompts"][:6], samples["prompts"][6:]):
        assert sorted(half.count(prompt) for prompt in set(half)) == [3, 3]
