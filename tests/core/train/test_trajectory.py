"""TrajectoryTrainer: its gradient by hand, however a step is split; exact resume; a tiny flow that learns; refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from trajectory_fixtures import (
    ROWS,
    Gradients,
    bright,
    broken_at,
    condition,
    constant,
    first_fails,
    gradients,
    largest,
    options,
    policy,
    rollout_of,
    settings,
    smooth,
    trainer,
    unsure,
    weights,
)
from transformers import TrainerCallback, TrainingArguments

from core.config import ConfigError, Launch
from core.objective.recipes import RECIPES, build
from core.policy.flow import FlowPolicy

PROVIDES = FlowPolicy.provides
FLOWS = sorted(name for name, recipe in RECIPES.items() if recipe.needs <= PROVIDES)


@pytest.mark.parametrize("name", FLOWS)
def test_the_split_of_a_step_leaves_its_gradient_alone(name, tmp_path):
    whole = gradients(options(name), tmp_path)
    assert max(float(g.abs().max()) for g in whole.values()) > 0
    size = 4 + RECIPES[name].extra_rollouts
    micro = size if "whole_groups" in RECIPES[name].needs else 5 if size == 5 else 2
    for split in ({"micro_steps": 1}, {"micro_steps": 3, "micro": micro}):
        assert largest(whole, gradients(options(name), tmp_path, **split)) < 1e-6, split


def test_the_first_gradient_is_reinforce_by_hand(tmp_path):
    rollout = rollout_of(window="first", window_size=3)
    seen = Gradients()
    config = settings(steps=1, rollout=rollout)
    made = trainer(
        {"recipe": "grpo", "eps": 0.0}, config, tmp_path, policy(double=True, **vars(rollout)), callbacks=[seen]
    )
    twin = policy(double=True, **vars(rollout))
    chosen = made._prompts(0)
    made.train()
    rows = [ROWS[i] for i, _ in chosen]
    acted = twin.rollout([condition(row) for row in rows], 4, [seed for _, seed in chosen])
    levels = [row["level"] for row in rows for _ in range(4)]
    reward = torch.tensor(bright(acted.outputs)) + 2 * torch.tensor(smooth(acted.outputs, level=levels))
    groups = reward.view(2, 4).double()
    advantage = ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)).flatten()
    states = acted.state["x"]
    loss = 0.0
    for t in range(3):  # the textbook's Gaussian of one step, from the velocity alone
        s, after = twin.schedule.sigmas[t], twin.schedule.sigmas[t + 1]
        x, then = states[:, t], states[:, t + 1]
        given = {"image": acted.state["condition/image"]}
        v = twin.net.velocity(x, torch.full((8,), s, dtype=torch.float64), given)
        sd = 0.7 * (s / (1 - (after if s == 1 else s))) ** 0.5
        score = -(x + (1 - s) * v) / s
        mean = x + v * (after - s) - 0.5 * sd**2 * score * (after - s)
        logp = -((then - mean) ** 2).flatten(1).mean(1) / (2 * sd**2 * (s - after))
        loss = loss - (advantage * logp).sum() / (8 * 3)
    loss.backward()
    expected = {f"net.{name}": p.grad for name, p in twin.net.named_parameters()}
    assert largest(expected, seen.found) < 1e-4  # the trainer's rewards are float32


def test_the_first_ratio_is_one_and_later_ones_are_not(tmp_path):
    made = trainer({"recipe": "grpo"}, settings(steps=4, micro=2, rollout=rollout_of(iterations=2)), tmp_path)
    made.train()
    deviations = [line["ratio_deviation_max"] for line in made.state.log_history[:4]]
    assert max(deviations[0], deviations[2]) < 1e-5 < min(deviations[1], deviations[3])


def test_in_bfloat16_the_first_ratio_is_still_exactly_one(tmp_path):
    acting = policy(half=True)
    made = trainer({"recipe": "grpo"}, settings(steps=1, micro=2, micro_steps=2), tmp_path, acting)
    made.train()
    assert made.state.log_history[0]["ratio_deviation_max"] == 0
    acted = acting.rollout([condition(ROWS[0])], 4, [7])
    assert not torch.equal(acted.logps, policy()(acted).logps), "bfloat16 must be on for this to mean anything"


class Blurred(torch.nn.Module):
    """A net whose velocities depend a little on how many rows it is given at once, as those of a GPU in bfloat16 do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("net", "_parameters", "_modules") else getattr(self.net, name)

    def velocity(self, x, sigma, condition):
        return self.net.velocity(x, sigma, condition) * (1 + 1e-2 / len(x))


def test_what_is_compared_comes_from_batches_of_one_shape(tmp_path):
    acting = policy(half=True)
    acting.net = Blurred(acting.net)
    made = trainer({"recipe": "grpo_guard"}, settings(steps=1, micro=2, micro_steps=3), tmp_path, acting)
    made.train()
    line = made.state.log_history[0]
    assert line["sampler_deviation"] > 0, "or it means nothing"
    assert line["drift"] == line["ratio_deviation_max"] == 0


def test_a_kept_rollout_weighs_the_same_in_whichever_update_it_lands(tmp_path):
    rows = [row for row in ROWS if row["id"] in ("row-3", "row-4", "row-5", "row-6")]
    made = trainer(
        {"recipe": "grpo"}, settings(steps=2, rollout=rollout_of(steps_per_batch=2)), tmp_path,
        rewards={"unsure": unsure}, rows=rows,
    )  # fmt: skip
    made._generate(0)
    kept = made.credit["keep"].view(2, -1).sum(1)
    assert kept.sum() == 10, "of sixteen, four do not apply and two could not be judged"
    assert kept[0] != kept[1]
    assert [made._update(part).kept_rows for part in (0, 1)] == [5, 5]
    assert [made._update(part).kept_decisions for part in (0, 1)] == [20, 20]


def learned(recipe, tmp_path, seed=0, steps=60, control="none", **rollout):
    """The mean reward of greedy maps before and after."""
    rollout = rollout_of(prompts_per_step=4, group_size=8, noise_level=0.9, **rollout)
    config = settings(steps=steps, lr=3e-3, optim="adamw_torch", seed=seed, control=control, rollout=rollout)
    acting = policy(seed, **vars(rollout))
    made = trainer({"recipe": recipe}, config, tmp_path, acting, {"bright": bright})

    def score():
        return float(np.mean(bright(acting.generate([condition(row) for row in ROWS], range(len(ROWS))))))

    before = score()
    made.train()
    return score() - before


def test_a_tiny_flow_learns(tmp_path):
    assert learned("grpo", tmp_path, steps=25) > 0.05


@pytest.mark.slow
def test_a_shuffled_control_does_not_learn(tmp_path):
    assert learned("grpo", tmp_path, control="shuffled_advantages") < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mc_grpo", "ngrpo", "gdpo", "gaussian_rank", "value_anchored", "diffusion_nft"])
def test_recipes_learn_on_flows(name, tmp_path):
    assert learned(name, tmp_path) > 0.05


# -- going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 7])
def test_a_resumed_run_ends_with_the_same_bits(stop, tmp_path):
    """Also in the middle of a generation batch, and in a later epoch (twelve rows, four a batch: three batches)."""
    rollout = rollout_of(steps_per_batch=2, iterations=1, window="active", shared_noise=True)
    config = settings(
        steps=8, lr=0.02, ema=0.9, rollout=rollout, save_strategy="steps", optim="adamw_torch", save_total_limit=9
    )

    def run(folder, checkpoint=None):
        made = trainer({"recipe": "grpo"}, config, folder, policy(**vars(rollout)))
        made.train(resume_from_checkpoint=checkpoint)
        return made

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert whole.policy.active == again.policy.active is not None
    for one, two in ((weights(whole), weights(again)), (whole.policy._averaged, again.policy._averaged)):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(weights(whole)[name], value) for name, value in whole.policy._averaged.items())


def test_a_rank_without_a_gpu_reads_its_checkpoint(tmp_path, monkeypatch):
    plain = TrainingArguments.device.fget
    numbered = property(lambda self: torch.device("cpu", 0) if plain(self).type == "cpu" else plain(self))
    monkeypatch.setattr(TrainingArguments, "device", numbered)  # what accelerate gives one of several
    config = settings(steps=2, ema=0.5, rollout=rollout_of(iterations=2), save_strategy="steps")
    trainer({"recipe": "grpo"}, config, tmp_path).train()
    made = trainer({"recipe": "grpo"}, config, tmp_path)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert made.state.global_step == 2


def test_an_evaluation_sees_the_averages_of_its_own_step(tmp_path):
    seen = []

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: value.clone() for name, value in model.memory()["averaged"].items()})

    made = trainer({"recipe": "grpo"}, settings(steps=2, ema=0.5), tmp_path, callbacks=[Evaluate()])
    made.train()
    now = weights(made)
    assert all(torch.equal(value, made.policy._averaged[name]) for name, value in seen[1].items())
    assert all(torch.allclose(value, (seen[0][name] + now[name]) / 2) for name, value in seen[1].items())
    assert seen[0].keys() == now.keys()


def test_a_checkpoint_is_the_nets_own_and_loads_weights_only(tmp_path):
    made = trainer({"recipe": "grpo"}, settings(steps=1, save_strategy="steps"), tmp_path)
    made.train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors", "generation_0.pt", "policy.pt"} <= names
    fresh = policy(seed=5)
    fresh.net.restore(tmp_path / "checkpoint-1")
    trained = weights(made)
    assert all(torch.equal(value, trained[name]) for name, value in fresh.net.state_dict().items())


def test_with_an_adapter_only_it_is_trained_and_the_reference_is_without_it(tmp_path):
    acting = policy(lora=4)
    before = {name: p.detach().clone() for name, p in acting.net.named_parameters()}
    config = settings(steps=3, lr=0.5, rollout=rollout_of(iterations=3), save_strategy="steps")
    made = trainer({"recipe": "flow_grpo", "beta": 0.1}, config, tmp_path, acting)
    made.train()
    moved = {name for name, p in acting.net.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert not acting._reference, "an adapter needs no copy"
    assert made.state.log_history[0]["kl"] < 1e-12 < made.state.log_history[2]["kl"]
    fresh = policy(lora=4)
    fresh.net.restore(tmp_path / "checkpoint-3")
    assert all(torch.equal(p, acting.net.get_parameter(name)) for name, p in fresh.net.named_parameters())


# -- what is scored -------------------------------------------------------------------------------------------------------


def test_what_could_not_be_judged_carries_no_weight(tmp_path):
    rewards = {"bright": bright, "smooth": smooth, "unsure": unsure}
    rows = [row for row in ROWS if row["id"] in ("row-3", "row-5")]
    seen = {}
    config = settings(steps=1, rollout=rollout_of())
    made = trainer(
        {"recipe": "grpo"}, config, tmp_path, rewards=rewards, rows=rows, on_rollouts=lambda step, c: seen.update(c)
    )
    made.train()
    kept = dict.fromkeys(("row-3", "row-5"), 0)
    for row, keep in zip(seen["prompt_id"], seen["keep"], strict=True):
        kept[row] += keep
    assert kept == {"row-3": 4, "row-5": 2}
    assert made.state.log_history[0]["unscored"] == 0.25
    assert sum(advantage != 0 for advantage in seen["advantage"]) == 6
    assert [output is None for output in seen["output"]] == [False] * 4 + [True] * 4


def test_dense_rewards_end_with_the_output_itself(tmp_path):
    acting = policy(window="first", window_size=3)
    acted = acting.rollout([condition(ROWS[0])], 4, [7], asks=frozenset({"aligned"}))
    assert len(acted.estimates) == 3
    for last, output in zip(acted.estimates[-1], acted.outputs, strict=True):
        assert np.array_equal(last, output)
    errors = [
        np.mean([np.abs(e - o).mean() for e, o in zip(step, acted.outputs, strict=True)]) for step in acted.estimates
    ]
    assert errors[0] > errors[1] > errors[2] == 0, "a later decision promises the output better"


def test_the_active_window_is_measured_once_and_used(tmp_path):
    rollout = rollout_of(window="active", shortcut=1, shared_noise=True)
    made = trainer({"recipe": "grpo"}, settings(steps=2, rollout=rollout), tmp_path, policy(**vars(rollout)))
    made.train()
    first, second = made.state.log_history[:2]
    variances = [first[f"active/variance_{k}"] for k in range(1, 5)]
    assert made.policy.active == next(k for k, v in enumerate(variances, 1) if v >= 0.9 * max(variances))
    assert not any(name.startswith("active") for name in second)
    assert made.policy.window(1) == range(made.policy.active)


def test_where_no_rewards_differ_every_step_stays_active(tmp_path):
    rollout = rollout_of(window="active", shared_noise=True)
    made = trainer(
        {"recipe": "grpo"},
        settings(steps=1, rollout=rollout),
        tmp_path,
        policy(**vars(rollout)),
        {"constant": constant},
    )
    made.train()
    assert made.policy.active == 4


def test_failures_of_every_decision_are_counted(tmp_path):
    broken_at.clear()
    made = trainer({"recipe": "value_anchored"}, settings(steps=1), tmp_path, rewards={"first_fails": first_fails})
    made.train()
    line = made.state.log_history[0]
    assert len(broken_at) == 4, "once a decision"
    assert line["unscored"] == 0.125
    assert line["reward_failures/first_fails"] == 1


def test_controls_are_functions_of_seed_and_generation(tmp_path):
    def ends(control, seed=0):
        made = trainer({"recipe": "grpo"}, settings(steps=2, seed=seed, control=control), tmp_path)
        made.train()
        return weights(made)

    for control in ("shuffled_advantages", "random_rewards"):
        assert largest(ends(control), ends(control)) == 0
        assert largest(ends(control), ends("none")) > 0


def test_an_update_that_is_not_finite_is_skipped_and_told(tmp_path):
    told, kept = [], []

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                made.credit["advantage"][0] = torch.nan
                kept.append(weights(made))

    rollout = rollout_of(iterations=2)
    made = trainer(
        {"recipe": "grpo"}, settings(steps=2, rollout=rollout), tmp_path, policy(**vars(rollout)),
        on_not_finite=lambda step, rows: told.append((step, len(rows))), callbacks=[Break()],
    )  # fmt: skip
    made.train()
    assert told == [(2, 8)]
    assert made.state.log_history[1]["skipped_updates"] == 1
    assert largest(kept[0], weights(made)) == 0


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "change", "words"),
    [
        ({"recipe": "token_hidden_reward"}, {}, "last hidden states"),
        ({"recipe": "sample_routed"}, {}, "a teacher"),
        ({"recipe": "group_preference"}, {"micro": 2}, "multiple of rollout.group_size=4"),
        ({"recipe": "grpo"}, {"launch": Launch(strategy="fsdp")}, "strategy=ddp"),
        ({"recipe": "grpo"}, {"learning_rat": 1}, "learning_rat"),
        ({"recipe": "bnpo"}, {}, "use token_mean"),
        ({"recipe": "diffusion_nft"}, {"rollout": rollout_of(shared_noise=True)}, "rollout.shared_noise=false"),
        ({"recipe": "grpo"}, {"rollout": rollout_of(window="active")}, "rollout.shared_noise=true"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(recipe, change, words, tmp_path):
    launch = change.pop("launch", Launch())
    config = replace(settings(**change), launch=launch)
    with pytest.raises(ConfigError, match=words):
        trainer(recipe, config, tmp_path)


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="1 training prompts are fewer than the 2"):
        trainer({"recipe": "grpo"}, settings(), tmp_path, rows=ROWS[:1])


def test_the_same_recipe_object_serves_language_and_flow():
    """Both trainers build the same frozen object; test_parity and the tests above train it on either side."""
    for name in ("mc_grpo", "ngrpo", "gdpo", "gaussian_rank"):
        assert build({"recipe": name}) == RECIPES[name]
        assert RECIPES[name].needs <= PROVIDES
