"""TrajectoryTrainer on forecasts: rewards of single decisions, decisions without loss, whole leads, a growing number of them."""

import numpy as np
import pytest
import torch
from trajectory_fixtures import (
    CELLS,
    FORECASTS,
    Cells,
    Gradients,
    cells,
    forecast_of,
    forecast_rows,
    gradients,
    hit,
    largest,
    near,
    options,
    settings,
    trainer,
    weights,
)

from core.app import Quantity
from core.config import ConfigError
from core.objective.recipes import RECIPES
from core.policy.forecast import ForecastPolicy
from core.policy.step_nets import ConvLSTM, UNet

RECIPES_OF_FORECASTS = sorted(name for name, recipe in RECIPES.items() if recipe.needs <= Cells.provides)


class Scripted(Cells):
    """Rollouts of one lead that decide what they are told: `script`, (G, cells)."""

    script = None

    def rollout(self, *args, **kwargs):
        made = super().rollout(*args, **kwargs)
        made.state["chosen"] = torch.tensor(self.script).repeat(len(made.logps) // len(self.script), 1)[:, None]
        made.outputs = list(made.state["chosen"].float().numpy())
        made.logps = self(made).logps.detach()
        return made


def costs(completions, *, valid):
    """1 less what an error costs, which is four times as much in the first cell; class 0 is right."""
    price = np.array([1.0, 0.25, 0.5, 0.5])
    return [np.where(v > 0, 1 - price * (made != 0), np.nan) for made, v in zip(completions, valid, strict=True)]


def first_unsure(completions, *, truth, valid):
    made = hit(completions, truth=truth, valid=valid)
    return [float("nan"), *made[1:]]


def too_long(completions):
    return [np.zeros(5) for _ in completions]


costs.scope = first_unsure.scope = too_long.scope = "batch"


def credited(recipe, tmp_path, acting=None, rewards=None, rollout=None, rows=None, **more):
    """A trainer that has sampled, scored and credited its first generation batch."""
    made = trainer(recipe, settings(rollout=rollout or forecast_of(), **more), tmp_path, acting, rewards, rows=rows)
    made._generate(0)
    return made


def scripted(script, tmp_path, recipe="forecast_grpo", **more):
    """Of one group and one lead, of whose four cells the last was not observed."""
    rollout = forecast_of(prompts_per_step=1, leads=1)
    rows = [{"id": "a", "prompt": "a", "x": np.zeros(CELLS, np.float32), "valid": np.array([[1, 1, 1, 0]], np.float32)}]
    acting = cells(**vars(rollout))
    acting.__class__, acting.script = Scripted, script
    return credited({"recipe": recipe, **more}, tmp_path, acting, {"costs": costs}, rollout, rows)


def test_a_reward_reaches_its_own_decision(tmp_path):
    """Rewards of cell 0: 1 1 0 0, centred .5 .5 -.5 -.5; of cell 1: all .75; of cell 2: 1 1 1 .5, centred .125 x3, -.375."""
    made = scripted([[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [2, 1, 2, 0]], tmp_path, eps=0.0)
    scale = np.sqrt((4 * 0.5**2 + 3 * 0.125**2 + 0.375**2) / 12)  # what was not observed has no part in it
    centred = [[0.5, 0, 0.125, 0], [0.5, 0, 0.125, 0], [-0.5, 0, 0.125, 0], [-0.5, 0, -0.375, 0]]
    torch.testing.assert_close(made.credit["advantage"], torch.tensor(centred) / scale, atol=1e-6, rtol=1e-6)
    assert made.trajectory.mask.tolist() == [[1, 1, 1, 0]] * 4


def test_what_costs_four_times_as_much_pushes_four_times_as_much(tmp_path):
    advantage = scripted([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0]], tmp_path).credit["advantage"]
    torch.testing.assert_close(advantage[:, 0], 4 * advantage[:, 1])
    assert advantage[0, 0] > 0 == advantage[:, 2].abs().max()
    scaled = scripted([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0]], tmp_path, scale="group").credit[
        "advantage"
    ]
    torch.testing.assert_close(scaled[:, 0], scaled[:, 1], atol=1e-2, rtol=1e-2)  # which a group's own scale cancels


def test_the_first_gradient_is_reinforce_over_observed_decisions_by_hand(tmp_path):
    rollout, seen = forecast_of(), Gradients()
    twin = cells(double=True, **vars(rollout))
    made = trainer(
        {"recipe": "forecast_grpo", "eps": 0.0}, settings(steps=1, rollout=rollout, micro=2, micro_steps=1), tmp_path,
        cells(double=True, **vars(rollout)), callbacks=[seen],
    )  # fmt: skip
    chosen = made._prompts(0)
    made.train()
    rows = [FORECASTS[i] for i, _ in chosen]
    acted = twin.rollout(rows, 4, [seed for _, seed in chosen])
    many = [row for row in rows for _ in range(4)]
    columns = {name: [row[name] for row in many] for name in ("truth", "valid")}
    dense = np.stack(hit(acted.outputs, **columns)).reshape(2, 4, -1)
    reward = dense + 2 * np.array(near(acted.outputs, **columns)).reshape(2, 4, 1)
    centred = reward - reward.mean(1, keepdims=True)
    observed = np.stack([row["valid"] for row in many]).reshape(2, 4, -1) > 0
    assert 0 < observed.sum() < observed.size
    advantage = np.where(observed, centred, 0) / np.sqrt((centred[observed] ** 2).mean())
    loss = -(torch.tensor(advantage).view(8, -1) * twin(acted).logps).sum() / observed.sum()
    loss.backward()
    expected = {f"net.{name}": p.grad for name, p in twin.net.named_parameters()}
    assert largest(expected, seen.found) < 1e-5  # the trainer's rewards are float32


@pytest.mark.parametrize("name", RECIPES_OF_FORECASTS)
def test_the_split_of_a_step_leaves_its_gradient_alone(name, tmp_path):
    rollout, told = forecast_of(iterations=2), options(name, "hit", "near")
    whole = gradients(told, tmp_path, rollout=rollout)
    assert max(float(g.abs().max()) for g in whole.values()) > 0
    size = 4 + RECIPES[name].extra_rollouts
    micro = size if "whole_groups" in RECIPES[name].needs else 5 if size == 5 else 2
    for split in ({"micro_steps": 1}, {"micro_steps": 2, "micro": micro}):
        assert largest(whole, gradients(told, tmp_path, rollout=rollout, **split)) < 1e-6, split


def test_counts_are_of_observed_decisions_of_kept_rollouts(tmp_path):
    made = credited(
        {"recipe": "forecast_grpo"},
        tmp_path,
        rewards={"first_unsure": first_unsure},
        rollout=forecast_of(steps_per_batch=2),
    )
    keep, mask = made.credit["keep"], made.trajectory.mask
    assert keep.tolist() == [0] + [1] * 15
    assert made._update(0).kept_rows == made._update(1).kept_rows == 7.5
    assert made._update(0).kept_decisions == made._update(1).kept_decisions == float(mask[1:].sum()) / 2 < 15 * 12 / 2


def test_a_recipe_without_dense_rewards_gets_the_mean_of_what_was_observed(tmp_path):
    seen = {}
    made = trainer(
        {"recipe": "grpo", "eps": 0.0}, settings(steps=1, rollout=forecast_of()), tmp_path, rewards={"hit": hit},
        on_rollouts=lambda step, columns: seen.update(columns),
    )  # fmt: skip
    outputs = []
    judge, made._judge = made._judge, lambda rows: (outputs.extend(made.trajectory.outputs), judge(rows))[1]
    made.train()
    rows = [next(row for row in FORECASTS if row["id"] == name) for name in seen["prompt_id"]]
    rewards = hit(outputs, truth=[row["truth"] for row in rows], valid=[row["valid"] for row in rows])
    means = torch.tensor([np.nanmean(values) for values in rewards], dtype=torch.float32).view(2, 4)
    expected = (means - means.mean(1, keepdim=True)) / means.std(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(seen["advantage"]).view(2, 4), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(seen["reward/hit"]), means.flatten())
    assert made.state.log_history[0]["rewards/hit/mean"] == pytest.approx(float(means.mean()))
    assert [output is None for output in seen["output"]] == [False] * 4 + [True] * 4


def test_a_reward_of_the_whole_forecast_stands_at_every_decision(tmp_path):
    advantage = credited({"recipe": "forecast_grpo"}, tmp_path, rewards={"near": near}).credit["advantage"]
    assert advantage.shape == (8, 3 * CELLS)
    assert torch.equal(advantage, advantage[:, :1].expand_as(advantage))
    assert advantage.abs().max() > 0


def test_blocks_of_decisions_share_their_credit(tmp_path):
    made = credited({"recipe": "forecast_grpo", "credit": "segment"}, tmp_path, rewards={"hit": hit})
    blocks = made.credit["advantage"].view(8, 3, CELLS)
    assert torch.equal(blocks, blocks[:, :, :1].expand_as(blocks))
    assert not torch.equal(blocks[:, 0], blocks[:, 1])


def test_some_rows_of_a_trajectory_are_all_of_them_there_is(tmp_path):
    whole = credited({"recipe": "forecast_grpo"}, tmp_path).trajectory
    part = whole.rows(slice(2, 5))
    assert part.unit == whole.unit == CELLS
    assert torch.equal(part.segments, whole.segments[2:5])
    assert torch.equal(part.logps, whole.logps[2:5])


def test_the_advantage_that_is_noted_is_the_mean_over_decisions_with_loss(tmp_path):
    seen = {}
    made = trainer(
        {"recipe": "forecast_grpo"}, settings(rollout=forecast_of()), tmp_path,
        on_rollouts=lambda step, columns: seen.update(columns),
    )  # fmt: skip
    made._generate(0)
    advantage, mask = made.credit["advantage"], made.trajectory.mask
    expected = [float(a[m > 0].mean()) for a, m in zip(advantage, mask, strict=True)]
    assert seen["advantage"] == pytest.approx(expected, abs=1e-6)


def test_a_shuffled_control_deals_out_whole_rows(tmp_path):
    plain, shuffled = (
        credited({"recipe": "forecast_grpo"}, tmp_path, control=control).credit["advantage"]
        for control in ("none", "shuffled_advantages")
    )
    assert not torch.equal(plain, shuffled)
    assert sorted(plain.tolist()) == sorted(shuffled.tolist())


def test_weights_may_change_between_generation_batches(tmp_path):
    made = trainer({"recipe": "forecast_grpo"}, settings(rollout=forecast_of()), tmp_path)

    def advantage(**weights):
        made.set_weights({"hit": 1.0, "near": 2.0} | weights)
        made._generate(0)
        return made.credit["advantage"]

    only, both = advantage(near=0.0), advantage()
    alone = credited({"recipe": "forecast_grpo"}, tmp_path, rewards={"hit": hit}).credit["advantage"]
    assert torch.equal(only, alone)
    assert not torch.equal(only, both)


def test_leads_may_grow_from_batch_to_batch(tmp_path):
    rollout = forecast_of(first_leads=1, leads_every=1)
    made = trainer(
        {"recipe": "forecast_grpo", "beta": 0.1}, settings(steps=4, micro_steps=2, rollout=rollout), tmp_path
    )
    sizes = []
    judge = made._judge
    made._judge = lambda rows: (sizes.append(made.trajectory.logps.shape[1]), judge(rows))[1]
    made.train()
    assert sizes == [4, 8, 12, 12]
    assert made.state.log_history[0]["kl"] < 1e-12 < made.state.log_history[3]["kl"]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_ends_with_the_same_bits(stop, tmp_path):
    """Also in the middle of a generation batch, while leads grow."""
    rollout = forecast_of(first_leads=1, leads_every=1, steps_per_batch=2)
    config = settings(
        steps=6, lr=0.02, ema=0.9, micro_steps=1, rollout=rollout, save_strategy="steps", optim="adamw_torch",
        save_total_limit=9,
    )  # fmt: skip

    def run(folder, checkpoint=None):
        made = trainer({"recipe": "forecast_grpo", "credit": "segment"}, config, folder)
        made.train(resume_from_checkpoint=checkpoint)
        return made

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for one, two in ((weights(whole), weights(again)), (whole.policy._averaged, again.policy._averaged)):
        assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [[line["reward"] for line in made.state.log_history if "reward" in line] for made in (whole, again)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3


def test_a_tiny_forecast_learns_and_a_shuffled_control_does_not(tmp_path):
    def gain(control, seed):
        rollout = forecast_of(prompts_per_step=4, group_size=8)
        rows = [
            row | {"truth": np.argmax([-row["x"], 0 * row["x"], row["x"]], axis=0)[None].repeat(3, 0)}
            for row in forecast_rows()
        ]
        config = settings(steps=40, lr=0.1, optim="adamw_torch", rollout=rollout, control=control, seed=seed)
        made = trainer({"recipe": "forecast_grpo"}, config, tmp_path, rewards={"hit": hit}, rows=rows)
        made.train()
        rewards = [line["reward"] for line in made.state.log_history if "reward" in line]
        return np.mean(rewards[-5:]) - np.mean(rewards[:5])

    assert gain("none", 0) > 0.2
    assert np.mean([gain("shuffled_advantages", seed) for seed in range(3)]) < 0.1


# -- real policies: nets over maps of 4 x 6, two variables, at most three leads


QUANTITY = Quantity(("a", "b"), ((15.0, 35.0), (30.0, 80.0)))


def maps(count=8):
    chance = np.random.default_rng(3)
    shapes = {"history": (2, 2, 4, 6), "seen": (2, 2, 4, 6), "given": (1, 4, 6), "ahead": (3, 2)}
    return [
        {name: chance.gamma(2, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        | {"id": f"row-{i}", "prompt": "maps", "truth": chance.gamma(2, 15, (3, 2, 4, 6))}
        | {"valid": (chance.random((3, 2, 4, 6)) < 0.6).astype(np.float32)}
        for i in range(count)
    ]


def close(completions, *, truth, valid):
    pairs = zip(completions, truth, valid, strict=True)
    return [np.where(v[: len(x)] > 0, np.exp(-np.abs(x - at[: len(x)]) / 20), np.nan) for x, at, v in pairs]


close.scope = "batch"


def real(net, rollout):
    shape = ForecastPolicy.shape(maps(1)[0], rollout, QUANTITY)
    torch.manual_seed(0)
    made = ConvLSTM(shape.inputs, shape.outputs, width=4) if net == "lstm" else UNet(*shape[:2], width=4, levels=1)
    with torch.no_grad():  # its last layer starts at 0, through which nothing is learned at first
        made.leave.weight.normal_(0, 0.3)
    return ForecastPolicy(made, rollout, QUANTITY)


def trained(net, folder, checkpoint=None, steps=6, feedback="mean", distribution="categorical", callbacks=(), **more):
    rollout = forecast_of(
        first_leads=2, leads_every=1, steps_per_batch=2, feedback=feedback, distribution=distribution, bins=6, rank=2
    )
    config = settings(steps=steps, rollout=rollout, **more)
    made = trainer(
        {"recipe": "forecast_grpo", "beta": 0.1}, config, folder, real(net, rollout), {"close": close}, rows=maps(),
        callbacks=callbacks,
    )  # fmt: skip
    made.train(resume_from_checkpoint=checkpoint)
    return made


@pytest.mark.parametrize(("net", "feedback"), [("unet", "mean"), ("unet", "sample"), ("lstm", "mean")])
def test_a_resumed_forecast_policy_ends_with_the_same_bits(net, feedback, tmp_path):
    common = {"lr": 0.02, "ema": 0.9, "micro_steps": 1, "optim": "adamw_torch", "save_strategy": "steps"}
    whole = trained(net, tmp_path / "whole", steps=4, feedback=feedback, save_total_limit=9, **common)
    for stop in (1, 2):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{stop}")
        again = trained(
            net, tmp_path / f"again-{stop}", checkpoint, steps=4, feedback=feedback, save_total_limit=1, **common
        )
        for one, two in ((weights(whole), weights(again)), (whole.policy._averaged, again.policy._averaged)):
            assert all(torch.equal(one[name], two[name]) for name in one)
    assert whole.state.log_history[0]["kl"] < 1e-6 < whole.state.log_history[3]["kl"]


@pytest.mark.parametrize(
    ("net", "feedback", "distribution"),
    [
        ("unet", "mean", "categorical"),
        ("unet", "sample", "gaussian"),
        ("lstm", "mean", "categorical"),
        ("unet", "mean", "low_rank"),
    ],
)
def test_the_split_of_a_step_of_a_forecast_policy_leaves_its_gradient_alone(net, feedback, distribution, tmp_path):
    def found(**split):
        seen = Gradients()
        trained(
            net, tmp_path, steps=3, lr=0.05, feedback=feedback, distribution=distribution, callbacks=[seen], **split
        )
        return seen.found

    whole = found()
    for split in ({"micro_steps": 1}, {"micro": 4, "micro_steps": 2}, {"micro": 2}):
        assert largest(whole, found(**split)) < 1e-3, split  # nets are float32


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_arrays_of_another_length_than_the_decisions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="arrays of 5 values and a rollout has 12 decisions"):
        credited({"recipe": "forecast_grpo"}, tmp_path, rewards={"too_long": too_long})


@pytest.mark.parametrize(("recipe", "words"), [("diffusion_nft", "noised again"), ("grpo_guard", "each step's mean")])
def test_what_only_flows_have_is_refused_in_words(recipe, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        trainer({"recipe": recipe}, settings(rollout=forecast_of()), tmp_path)


def test_an_entropy_bonus_is_for_policies_that_have_entropies(tmp_path):
    plain = gradients({"recipe": "grpo"}, tmp_path, rollout=forecast_of(iterations=2))
    bonus = gradients({"recipe": "grpo", "entropy_coef": 0.1}, tmp_path, rollout=forecast_of(iterations=2))
    split = gradients(
        {"recipe": "grpo", "entropy_coef": 0.1}, tmp_path, rollout=forecast_of(iterations=2), micro=2, micro_steps=1
    )
    assert largest(bonus, split) < 1e-6 < largest(plain, bonus)
    with pytest.raises(ConfigError, match="entropies"):
        trainer({"recipe": "grpo", "entropy_coef": 0.1}, settings(), tmp_path)
