"""Bit parity with TRL 1.16 in float32: its own `_compute_loss` and `nanstd`, run on the same tensors.

The whole trainer is compared elsewhere; here the loss code of the installed TRL runs with a stand-in for the trainer. Its
loss_type=grpo averages within a micro-batch, which is reduction=sequence_mean_local here.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from core.objective.group import Group
from core.objective.recipes import RECIPES, gdpo, grpo, rloo
from core.objective.rows import Counts, Rows

ACCUMULATION = 2


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scored_rewards(prompts, size, components):
    """Rewards as they come: many ties, a component that does not apply, an unscored rollout, constant groups."""
    rewards = (random(prompts, size, components, seed=prompts * size) * 2).round() / 3
    rewards[0] = 0.0
    rewards[-1, 0, 0] = torch.nan
    rewards[-1, 1] = torch.nan
    return rewards


def trl_advantages(rewards, weights, aggregation, scale):
    """GRPOTrainer._generate_and_score_completions of TRL 1.16, the lines between rewards and advantages."""
    size = rewards.shape[1]
    rewards_per_func = rewards.flatten(0, 1)
    unscorable = torch.isnan(rewards_per_func).all(dim=1)
    if aggregation == "sum_then_normalize":
        total = (rewards_per_func * weights.unsqueeze(0)).nansum(dim=1)
        total[unscorable] = torch.nan
        advantages = total - torch.nanmean(total.view(-1, size), dim=1).repeat_interleave(size, dim=0)
        if scale == "group":
            advantages = advantages / (nanstd(total.view(-1, size), dim=1).repeat_interleave(size, dim=0) + 1e-4)
        elif scale == "batch":
            advantages = advantages / (nanstd(total).expand_as(total) + 1e-4)
    else:
        grouped = rewards_per_func.view(-1, size, rewards_per_func.shape[1])
        each = (grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
        total = (each.view_as(rewards_per_func) * weights.unsqueeze(0)).nansum(dim=1)
        total[unscorable] = torch.nan
        advantages = (total - torch.nanmean(total)) / (nanstd(total).expand_as(total) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.mark.parametrize(("prompts", "size"), [(4, 2), (3, 5), (8, 8), (17, 16), (40, 7)])
@pytest.mark.parametrize("components", [1, 3, 5])
@pytest.mark.parametrize(
    ("recipe", "aggregation", "scale"),
    [
        (grpo, "sum_then_normalize", "group"),
        (grpo(scale="batch"), "sum_then_normalize", "batch"),
        (RECIPES["dr_grpo"], "sum_then_normalize", "none"),
        (gdpo, "normalize_then_sum", None),
    ],
    ids=["group", "batch", "none", "gdpo"],
)
def test_advantages_have_trl_s_bits(recipe, aggregation, scale, prompts, size, components):
    rewards, weights = scored_rewards(prompts, size, components), torch.tensor([3.0, 1.0, 0.5, 0.1, -0.3])[:components]
    expected = trl_advantages(rewards, weights, aggregation, scale)
    credit = recipe.credit(Group(rewards=rewards, weights=weights))
    constant = expected.view(prompts, size).std(1) == 0  # rounding residue in groups without spread: 0 here
    different = torch.where(constant.repeat_interleave(size), 0.0, credit.advantage - expected)
    if recipe is gdpo:
        different = credit.advantage - expected
    assert (different == 0).all()
    assert credit.keep.sum() == (~rewards.isnan().all(2)).sum()


@pytest.mark.parametrize("size", [2, 6, 8])
def test_leave_one_out_has_the_bits_of_trl_s_rloo(size):
    rewards = scored_rewards(5, size, 1)
    grouped = rewards.squeeze(2)
    count = (~grouped.isnan()).sum(dim=1, keepdim=True)
    expected = torch.nan_to_num(grouped - (grouped.nansum(dim=1, keepdim=True) - grouped) / (count - 1), nan=0.0)
    assert torch.equal(rloo.credit(Group(rewards=rewards, weights=torch.ones(1))).advantage, expected.flatten())


def trl_loss(inputs, logps, **settings):
    """GRPOTrainer._compute_loss on given log-probabilities: training, one process, ACCUMULATION micro-batches."""
    settings = {
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "delta": None, "use_bias_correction_kl": True,
    } | settings  # fmt: skip
    trainer = SimpleNamespace(
        **settings,
        args=SimpleNamespace(
            delta=settings["delta"],
            use_bias_correction_kl=settings["use_bias_correction_kl"],
            steps_per_generation=ACCUMULATION,
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.ones_like(logps), None),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=ACCUMULATION,
        max_completion_length=inputs["completion_ids"].shape[1],
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, trainer._metrics["train"]


local = grpo(reduction="sequence_mean_local")
CASES = {
    "grpo": (local, {}),
    "grpo, two epsilons and delta": (
        local(epsilon_low=0.1, epsilon_high=0.3, delta=1.4),
        {"epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.4},
    ),
    "grpo, kl": (local(beta=0.04), {"beta": 0.04}),
    "grpo, kl without weight": (local(beta=0.04, kl_weight="none"), {"beta": 0.04, "use_bias_correction_kl": False}),
    "bnpo": (RECIPES["bnpo"], {"loss_type": "bnpo"}),
    "dapo": (RECIPES["dapo"], {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, kl": (RECIPES["dapo"](beta=0.1), {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1}),
    "dr_grpo": (RECIPES["dr_grpo"], {"loss_type": "dr_grpo"}),
    "cispo": (RECIPES["cispo"](epsilon_high=1.2), {"loss_type": "cispo", "epsilon_high": 1.2}),
    "gspo": (
        RECIPES["gspo"](reduction="sequence_mean_local"),
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, kl": (
        RECIPES["gspo"](beta=0.1, kl_weight="sequence", reduction="token_mean"),
        {
            "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "beta": 0.1,
            "loss_type": "dapo",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("advantage_shape", [(8,), (8, 6)], ids=["row", "token"])
@pytest.mark.parametrize("case", list(CASES))
def test_loss_and_gradient_have_trl_s_bits(case, advantage_shape, on_policy):
    recipe, settings = CASES[case]
    mask = (torch.arange(6) < torch.tensor([6, 1, 3, 0, 4, 6, 2, 5]).unsqueeze(1)).long()
    logps = (-random(8, 6, seed=1).abs()).requires_grad_()
    old = None if on_policy else logps.detach() + 0.3 * random(8, 6, seed=2)
    ref, advantage = logps.detach() + 0.2 * random(8, 6, seed=3), random(*advantage_shape, seed=4)
    tokens = 2 * int(mask.sum()) + 3  # of both micro-batches
    inputs = {
        "prompt_ids": torch.zeros(8, 2, dtype=torch.long), "prompt_mask": torch.ones(8, 2, dtype=torch.long),
        "completion_ids": torch.zeros(8, 6, dtype=torch.long), "completion_mask": mask, "advantages": advantage,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": torch.tensor(tokens),
    }  # fmt: skip
    expected, metrics = trl_loss(inputs, logps, **settings)
    loss = recipe.loss(
        Rows(
            logps=logps,
            mask=mask,
            advantage=advantage,
            old_logps=old,
            ref_logps=ref,
            keep=torch.ones(8),
            counts=Counts(rows=8.0 * ACCUMULATION, tokens=float(tokens), max_length=6),
        )
    )
    got = loss.sum / loss.count
    got = got / ACCUMULATION if loss.local else got
    (expected_gradient,) = torch.autograd.grad(expected, logps)
    (gradient,) = torch.autograd.grad(got, logps)
    assert torch.equal(got, expected)
    assert torch.equal(gradient, expected_gradient)
    assert gradient.abs().sum() > 0
    share = {name: (total / count).item() for name, (total, count) in loss.metrics.items()}
    names = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
    if settings.get("loss_type") == "cispo":
        names = {"clip_high": "cispo_clip_ratio"}
    for ours, theirs in names.items():
        assert share[ours] == pytest.approx(metrics[theirs][0], abs=1e-6)
