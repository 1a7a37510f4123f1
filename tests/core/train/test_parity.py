"""LanguageTrainer has the bits of stock trl.GRPOTrainer: weights, and the logged loss, gradient norm and reward.

For every recipe that TRL also has, in every way in which a generation batch becomes steps; with everything that TRL
multiplies or adds around its loss; with LoRA; over twenty steps. What differs, and by how much, stands at the end.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.trainer.utils import nanstd

sys.path.insert(0, str(Path(__file__).parent))  # workers get the parent's sys.path

from language_fixtures import (
    language_trainer,
    logged,
    mixture_of_experts,
    model,
    same,
    settings,
    stock_trainer,
    train,
)

from core.objective.recipes import build

SETTINGS = {  # each with enough steps for a second generation batch
    "one pass": {"micro": 8, "passes": 1, "steps": 4},
    "two passes": {"micro": 8, "passes": 2, "steps": 4},
    "two micro-batches": {"micro": 4, "passes": 1, "steps": 4},
    "four steps a batch": {"micro": 8, "passes": 1, "parts": 4, "steps": 6},
    "two steps a batch, two micro-batches": {"micro": 4, "passes": 1, "parts": 2, "steps": 4},
}
ALL_AT_ONCE = {"micro": 4, "passes": 2, "parts": 2, "steps": 6}
REWARDS, WEIGHTS = ("spread", "shortness"), [1.0, 0.3]
SAME_NAME = ("loss", "grad_norm", "reward", "reward_std", "rewards/shortness/mean", "completions/mean_length",
             "entropy_coef", "aux_loss")  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the policies: TRL loads the reference from the policy's own folder."""
    folder = tmp_path_factory.mktemp("policies")
    for make in (model, mixture_of_experts):
        make().save_pretrained(folder / make.__name__)
    return folder


@pytest.fixture
def pair(workers, saved, tmp_path):
    """(ours, stock): the same policy, settings and fields of GRPOConfig; the objective in each one's own words."""

    def make(objective, arguments, setting, *, policy="model", peft=None, rewards=REWARDS, **fields):
        config = settings(**setting, **fields)

        def start():
            return AutoModelForCausalLM.from_pretrained(saved / policy, dtype=torch.float32)

        shared = {"config": config, "rewards": rewards, "weights": WEIGHTS[: len(rewards)], "peft_config": peft}
        ours = language_trainer(workers, tmp_path, build(objective), policy=start(), **shared)
        return ours, stock_trainer(tmp_path, policy=start(), **shared, **arguments, **fields)

    return make


def assert_same_bits(ours, stock):
    """Trains both and returns the weights."""
    got, expected = train(ours), train(stock)
    for name in SAME_NAME:
        assert logged(ours, name) == logged(stock, name), name
    norms = logged(ours, "grad_norm")
    assert len(norms) == ours.args.max_steps
    assert len(set(norms)) > len(norms) / 2  # where everything is masked or clipped, it is 0
    assert set(logged(ours, "zero_spread")) == {0.0}  # such groups differ, see the end
    assert same(got, expected)
    return got


GRPO = {"loss_type": "grpo"}
GSPO = GRPO | {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
RECIPE = {  # in our words, in TRL's
    "grpo": ({"recipe": "grpo"}, GRPO),
    "grpo, two epsilons and delta": (
        {"recipe": "grpo", "epsilon_low": 0.001, "epsilon_high": 0.002, "delta": 1.05},
        GRPO | {"epsilon": 0.001, "epsilon_high": 0.002, "delta": 1.05},
    ),
    "dapo": ({"recipe": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": ({"recipe": "bnpo"}, {"loss_type": "bnpo"}),
    "dr_grpo": ({"recipe": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "cispo": ({"recipe": "cispo", "epsilon_high": 1.01}, {"loss_type": "cispo", "epsilon_high": 1.01}),
    "gspo": ({"recipe": "gspo"}, GSPO),
    "gdpo": ({"recipe": "gdpo"}, GRPO | {"multi_objective_aggregation": "normalize_then_sum"}),
    "batch scale": ({"recipe": "grpo", "scale": "batch"}, GRPO | {"scale_rewards": "batch"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("recipe", RECIPE)
def test_a_recipe_has_trl_s_bits(recipe, setting, pair):
    got = assert_same_bits(*pair(*RECIPE[recipe], SETTINGS[setting]))
    assert not same(got, model().state_dict())


KL = {
    "grpo": ({"recipe": "grpo", "beta": 0.04}, GRPO),
    "grpo, kl not weighted by the ratio": (
        {"recipe": "grpo", "beta": 0.04, "kl_weight": "none"}, GRPO | {"use_bias_correction_kl": False},
    ),
    "dapo": ({"recipe": "dapo", "beta": 0.04}, RECIPE["dapo"][1]),
    "bnpo": ({"recipe": "bnpo", "beta": 0.04}, RECIPE["bnpo"][1]),
    "dr_grpo": ({"recipe": "dr_grpo", "beta": 0.04}, RECIPE["dr_grpo"][1]),
    "cispo": ({"recipe": "cispo", "epsilon_high": 1.01, "beta": 0.04}, RECIPE["cispo"][1]),
    "gspo": ({"recipe": "gspo", "beta": 0.04, "kl_weight": "sequence"}, GSPO),
    "gspo, kl not weighted by the ratio": (
        {"recipe": "gspo", "beta": 0.04, "kl_weight": "none"}, GSPO | {"use_bias_correction_kl": False},
    ),
    "gdpo": ({"recipe": "gdpo", "beta": 0.04}, RECIPE["gdpo"][1]),
}  # fmt: skip


def assert_kl_has_trl_s_bits(recipe, setting, pair):
    objective, arguments = KL[recipe]
    ours, stock = pair(objective, arguments | {"beta": 0.04}, setting)
    assert_same_bits(ours, stock)
    assert logged(ours, "kl")[-1] > 0
    if objective.get("kl_weight") == "none":  # TRL logs the weighted estimate
        assert logged(ours, "kl") == pytest.approx(logged(stock, "kl"), rel=1e-6)


@pytest.mark.parametrize("recipe", KL)
def test_distance_to_a_reference_has_trl_s_bits(recipe, pair):
    assert_kl_has_trl_s_bits(recipe, ALL_AT_ONCE, pair)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("recipe", KL)
def test_distance_to_a_reference_has_trl_s_bits_in_every_setting(recipe, setting, pair):
    assert_kl_has_trl_s_bits(recipe, SETTINGS[setting], pair)


# -- what TRL multiplies or adds around its loss


def fed(trainer, *, sampler=None, tools=False, gaps=False):
    """The trainer, with what vLLM or a tool loop would have said of the completions that transformers has sampled.

    sampler: attributes of TRL that say what is done with vLLM's log-probabilities; gaps: some of these are NaN there.
    tools: every third token, and all of some completions, were written by a tool.
    """
    generate = trainer._generate

    def fed_generate(prompts):
        trainer.use_vllm = False
        prompt_ids, completion_ids, mask, completions, logprobs, *rest = generate(prompts)
        trainer.use_vllm = sampler is not None
        if sampler is not None:  # about log(1 / 23), every word's at the start
            logprobs = [
                [None if gaps and token % 5 == 0 else -3.1 + math.sin(7 * token + t) / 3 for t, token in enumerate(ids)]
                for ids in completion_ids
            ]
        if tools:
            mask = [[int(ids[0] % 4 > 0 and t % 3 > 0) for t in range(len(ids))] for ids in completion_ids]
        return prompt_ids, completion_ids, mask, completions, logprobs, *rest

    trainer._generate = fed_generate
    for name, value in (sampler or {}).items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    return trainer


def vllm(mode):
    low, high = (0.8, 1.3) if mode.startswith("token") else (None, 8.0)
    return {
        "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high,
    }  # fmt: skip


ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 2.9, "entropy_coef": 0.05, "entropy_coef_delta": 0.01}
EXTRAS = {  # fields of GRPOConfig on both sides; "feed", "policy" and "recipe" apart
    "long completions masked": {"mask_truncated_completions": True},
    "high-entropy tokens": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.05},
    "adaptive entropy": ADAPTIVE,
    "off-policy mask": {"off_policy_mask_threshold": 1e-3},
    "tool mask": {"feed": {"tools": True}},
    "router loss": {"policy": "mixture_of_experts", "router_aux_loss_coef": 0.5},
    "vllm, token_truncate": {"feed": {"sampler": vllm("token_truncate")}},
    "vllm, token_mask": {"feed": {"sampler": vllm("token_mask")}},
    "vllm, sequence_truncate": {"feed": {"sampler": vllm("sequence_truncate")}},
    "vllm, sequence_mask": {"feed": {"sampler": vllm("sequence_mask")}},
    "vllm, token_truncate, with gaps": {"feed": {"sampler": vllm("token_truncate"), "gaps": True}},
    "vllm, sequence_mask, with gaps": {"feed": {"sampler": vllm("sequence_mask"), "gaps": True}},
    "vllm, gspo, token_mask": {"recipe": "gspo", "feed": {"sampler": vllm("token_mask")}},
    "vllm, gspo, sequence_truncate": {"recipe": "gspo", "feed": {"sampler": vllm("sequence_truncate")}},
    "vllm, dapo, sequence_mask": {"recipe": "dapo", "feed": {"sampler": vllm("sequence_mask")}},
}
TWO = {
    "tool mask, vllm with gaps": {"feed": {"tools": True, "sampler": vllm("sequence_mask"), "gaps": True}},
    "tool mask, long completions masked": {"feed": {"tools": True}, "mask_truncated_completions": True},
    "tool mask, dapo": {"recipe": "dapo", "feed": {"tools": True}},
    "long completions masked, dapo": {"recipe": "dapo", "mask_truncated_completions": True},
    "long completions masked, adaptive entropy": ADAPTIVE | {"mask_truncated_completions": True},
    "high-entropy tokens, entropy bonus": {"top_entropy_quantile": 0.5, "entropy_coef": 0.05},
    "high-entropy tokens, adaptive entropy": ADAPTIVE | {"top_entropy_quantile": 0.5},
    "high-entropy tokens, gspo": {"recipe": "gspo", "top_entropy_quantile": 0.5},
    "off-policy mask, vllm with gaps": {
        "off_policy_mask_threshold": 0.1, "feed": {"sampler": vllm("token_truncate"), "gaps": True},
    },
    "off-policy mask by vllm's log-probabilities": {
        "off_policy_mask_threshold": 0.1, "feed": {"sampler": {"vllm_importance_sampling_correction": False}},
    },
    "off-policy mask, high-entropy tokens": {"off_policy_mask_threshold": 1e-3, "top_entropy_quantile": 0.5},
    "router loss, entropy bonus": {"policy": "mixture_of_experts", "router_aux_loss_coef": 0.5, "entropy_coef": 0.05},
    "router loss, vllm": {
        "policy": "mixture_of_experts", "router_aux_loss_coef": 0.5, "feed": {"sampler": vllm("token_mask")},
    },
    "kl, off-policy mask": {"beta": 0.04, "off_policy_mask_threshold": 1e-3},
    "kl, vllm": {"beta": 0.04, "feed": {"sampler": vllm("sequence_truncate")}},
    "kl, high-entropy tokens": {"beta": 0.04, "top_entropy_quantile": 0.5},
    "kl, tool mask": {"beta": 0.04, "feed": {"tools": True}},
    "kl, router loss": {"beta": 0.04, "policy": "mixture_of_experts", "router_aux_loss_coef": 0.5},
}  # fmt: skip


def with_extra(pair, extra, setting):
    extra = dict(extra)
    objective, arguments = RECIPE[extra.pop("recipe", "grpo")]
    feed, beta = extra.pop("feed", {}), {"beta": extra.pop("beta", 0.0)}
    return [fed(trainer, **feed) for trainer in pair(objective | beta, arguments | beta, setting, **extra)]


@pytest.fixture(scope="module")
def without(workers, saved, tmp_path_factory):
    """Stock's weights without the extra, made once for each policy and recipe."""
    found = {}

    def weights(policy="model", recipe="grpo", **_):
        if (policy, recipe) not in found:
            start = AutoModelForCausalLM.from_pretrained(saved / policy, dtype=torch.float32)
            shared = {"config": settings(**ALL_AT_ONCE), "rewards": REWARDS, "weights": WEIGHTS}
            arguments = RECIPE[recipe][1] | {"router_aux_loss_coef": 0.0}
            stock = stock_trainer(tmp_path_factory.mktemp("without"), policy=start, **shared, **arguments)
            found[policy, recipe] = train(stock)
        return found[policy, recipe]

    return weights


@pytest.mark.parametrize("extra", [*EXTRAS, *TWO])
def test_what_trl_adds_around_its_loss_has_trl_s_bits_and_matters(extra, pair, without):
    extra = (EXTRAS | TWO)[extra]
    ours, stock = with_extra(pair, extra, ALL_AT_ONCE)
    assert not same(assert_same_bits(ours, stock), without(**extra))
    for name, written in (("use_adaptive_entropy", "entropy_coef"), ("router_aux_loss_coef", "aux_loss")):
        if name in extra:
            assert len(set(logged(ours, written))) > 2


@pytest.mark.parametrize("setting", ["two micro-batches", "four steps a batch"])
@pytest.mark.parametrize("extra", ["entropy bonus", "adaptive entropy"])
def test_entropy_terms_have_trl_s_bits_over_micro_batches_and_steps_of_one_batch(extra, setting, pair):
    assert_same_bits(*with_extra(pair, EXTRAS[extra], SETTINGS[setting]))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("extra", [*EXTRAS, *TWO])
def test_what_trl_adds_around_its_loss_has_trl_s_bits_in_every_setting(extra, setting, pair):
    assert_same_bits(*with_extra(pair, (EXTRAS | TWO)[extra], SETTINGS[setting]))


# -- LoRA


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_adapter_has_trl_s_bits_and_leaves_the_base_alone(setting, pair):
    got = assert_same_bits(*pair(*RECIPE["grpo"], SETTINGS[setting], peft=lora()))
    base = model().state_dict()
    kept = {name.removeprefix("base_model.model.").replace(".base_layer", ""): value for name, value in got.items()}
    assert same({name: kept[name] for name in base}, base)
    assert all(value.any() for name, value in got.items() if "lora_B" in name)


@pytest.mark.parametrize("extra", ["long completions masked", "vllm, sequence_mask", "adaptive entropy"])
def test_an_adapter_s_reference_is_the_base_and_has_trl_s_bits(extra, pair):
    """On-policy, so that a reference that held the adapter would be at no distance."""
    ours, stock = with_extra(pair, EXTRAS[extra] | {"beta": 0.04, "peft": lora()}, SETTINGS["two micro-batches"])
    assert_same_bits(ours, stock)
    first, second, *_ = logged(ours, "kl")
    assert first < 1e-6 < second


# -- longer

LONG = {"steps": 20, "lr": 2e-3}  # so slow that no group loses its spread


@pytest.mark.parametrize(
    ("recipe", "setting", "peft"),
    [
        *[("grpo", setting, False) for setting in SETTINGS],
        ("grpo", "all at once", False),
        ("grpo", "all at once", True),
        ("dapo", "all at once", False),
        ("gspo", "all at once", False),
    ],
)
def test_twenty_steps_have_trl_s_bits_at_each(recipe, setting, peft, pair):
    setting = (SETTINGS | {"all at once": ALL_AT_ONCE})[setting] | LONG
    ours, stock = pair(*RECIPE[recipe], setting, peft=lora() if peft else None)
    assert_same_bits(ours, stock)
    assert logged(ours, "epoch")[-1] > 1


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("recipe", RECIPE)
def test_twenty_steps_have_trl_s_bits_in_every_setting(recipe, setting, peft, pair):
    assert_same_bits(*pair(*RECIPE[recipe], SETTINGS[setting] | LONG, peft=lora() if peft else None))


# -- rewards that do not apply, batches that do not halve


def test_a_reward_that_does_not_apply_to_some_has_trl_s_bits(pair):
    ours, stock = pair(*RECIPE["grpo"], ALL_AT_ONCE, rewards=("spread", "early_end"))
    assert_same_bits(ours, stock)
    assert logged(ours, "rewards/early_end/mean") == logged(stock, "rewards/early_end/mean")


THIRDS = {"prompts": 3, "group": 3, "micro": 3, "parts": 3, "passes": 1, "steps": 6}


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "bnpo", "gdpo"])
def test_a_batch_of_three_steps_of_three_micro_batches_of_three_has_trl_s_bits(recipe, pair):
    """TRL's mean over rows divides twice, by rows and by micro-batches; the exact one once, with the same bits in halves only."""
    objective, arguments = RECIPE[recipe]
    if recipe in ("grpo", "gdpo"):
        objective = {**objective, "reduction": "sequence_mean_local"}
    assert_same_bits(*pair(objective, arguments, THIRDS))


# -- what differs


def advantages(ours, stock):
    """Of the first generation batch, (P, G) each, with the rewards."""
    batches = []
    ours.on_rollouts = lambda step, columns: batches.append(columns)
    train(ours)
    train(stock)
    shape, columns = (-1, ours.num_generations), batches[0]
    rewards, got = (torch.tensor(columns[name]).view(shape) for name in ("reward", "advantage"))
    return rewards, got, torch.tensor(list(stock._logs["advantages"])).view(shape)


def test_a_group_without_spread_gets_0_where_trl_leaves_its_rounding_error(pair):
    setting = {"prompts": 8, "group": 8, "micro": 64, "passes": 1, "steps": 1}
    rewards, got, expected = advantages(*pair(*RECIPE["grpo"], setting, rewards=("no_colour_first",)))
    flat = rewards.eq(rewards[:, :1]).all(1)
    assert 0 < flat.sum() < len(flat)
    assert torch.equal(got[~flat], expected[~flat])
    assert (got[flat] == 0).all()
    error = rewards[flat] - rewards[flat].nanmean(1, keepdim=True)
    assert torch.equal(expected[flat], error / (nanstd(rewards[flat], dim=1, keepdim=True) + 1e-4))
    assert 1e-4 < expected[flat].abs().max() < 1e-3


def test_a_batch_without_any_spread_moves_no_weight_where_trl_s_moves(pair):
    setting = {"prompts": 2, "group": 8, "micro": 16, "passes": 1, "steps": 1}
    ours, stock = pair(*RECIPE["grpo"], setting, rewards=("constant",))
    start = model().state_dict()
    assert same(train(ours), start)
    assert logged(ours, "grad_norm") == [0.0]
    moved = train(stock)
    assert max((moved[name] - start[name]).abs().max() for name in start) == pytest.approx(1e-2, rel=0.1)  # = lr


def test_dr_grpo_divides_once_where_trl_divides_twice(pair):
    """By rows x length x accumulation: the same to the last bit or two, and the same bits if it is a power of two."""
    ours, stock = pair(*RECIPE["dr_grpo"], THIRDS)
    train(ours)
    train(stock)
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-6)
    assert logged(ours, "grad_norm") == pytest.approx(logged(stock, "grad_norm"), rel=1e-6)
