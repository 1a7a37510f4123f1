"""The family recipe by recipe: gradients, options, refusals. Every test walks over all recipes that there are."""

import re

import pytest
import torch
from objective_fixtures import LOSSES, NAMES, fitted, flow_extras, group_for, rows_of
from torch.autograd import gradcheck

from core.objective.composition import ASKED, BECAUSE, COMPONENTS, LOSS_SLOTS, NEEDS, combine
from core.objective.group import Group
from core.objective.recipes import RECIPES, build, cispo, dapo, flow_grpo, gdpo, group_preference, grpo, gspo
from core.objective.rows import Counts, Loss, Rows

# A detached weight is held by finite differences too: the cap is below all ratios, REINFORCE goes without the ratio (with
# it, test_surrogate finds the gradient of the clipped loss). The narrow clips of flows would stop the first rollout's too.
HELD = {
    "cispo": {"epsilon_high": 0.01},
    "rec": {"weight": "none"},
    "flow_grpo": {"epsilon_low": 0.2},
    "grpo_guard": {"epsilon_low": 0.2},
}
RATIOS_AND_TERMS = [
    recipe for recipe in LOSSES.values() if recipe.loss_fn is None
]  # the others: test_forward_process.py
READINGS = [
    RECIPES[name](**options)
    for name, options in (
        ("rec", {"weight": "none", "clip": "two_side"}),
        ("rec", {"weight": "none", "clip": "ring"}),
        ("dhpo", {"pessimism": "mixed"}),
        ("dhpo", {"pessimism": "none"}),
        ("dhpo", {"mix": "entropy"}),
        ("llds", {"level": "rollout"}),
        ("llds", {"level": "token"}),
        ("grpo", {"reduction": "sequence_mean_local"}),
        ("grpo", {"delta": 2.0}),
    )
]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(logps, advantage, **fields):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    return Rows(logps=logps, mask=mask, advantage=advantage, counts=Counts(rows=4, tokens=9, max_length=3), **fields)


# The first rollout lies inside even a sequence's clip, the others on both sides of every range; the third one is dropped.
RATIOS = [
    [1.0001, 0.9999, 1.0002],
    [1.5, 0.7, 1.05],
    [0.5, 2.0, 1.0],
    [0.6, 1.1, 3.5],
    [0.3, 0.9, 1.5],
    [3.5, 1.3, 1.1],
]
FAR = torch.tensor(RATIOS, dtype=torch.float64).log()
ADVANTAGE = torch.tensor([1.0, -1.0, 2.0, 1.5, -0.7, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("recipe", [*RATIOS_AND_TERMS, *READINGS], ids=lambda recipe: recipe.name)
def test_gradient_by_finite_differences(recipe):
    """With a weight, a dropped row, padding, a KL, and everything in the extras that a recipe may look at."""
    recipe = recipe(beta=0.1, **(HELD.get(recipe.name, {}) if recipe in RATIOS_AND_TERMS else {}))
    by_entropy = recipe.options.get("mix") == "entropy"  # which is detached there
    old = random(6, 3, seed=0) - 2
    ref, entropy, distance = old + random(6, 3, seed=1), random(6, 3, seed=2), random(6, 3, seed=3)
    weight = random(6, 3, seed=4).exp()
    extras = {
        "protected": torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0]).double(),
        "entropy_gate": torch.tensor([1.0, -1.0, 1.0, 0.0, 2.0, -3.0]).double(),
        "entropy_bound": torch.tensor([0.8, 0.2, 0.8, 0.2, 0.8, 0.2]).double(),
        "distillation_weight": torch.tensor([0.0, 1.5, 0.5, 0.0, 0.0, 0.7]).double().unsqueeze(1).expand(6, 3),
    }
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    counts = Counts(rows=7, tokens=19, max_length=3)

    flow = flow_extras(random(6, 3, seed=5))

    def value(logps, entropy, *learnt):
        loss = fitted(recipe, entropy_coef=0.0 if by_entropy else 0.1).loss(
            Rows(
                logps=logps,
                mask=mask,
                advantage=ADVANTAGE,
                counts=counts,
                old_logps=old,
                ref_logps=ref,
                keep=torch.tensor([1, 1, 0, 1, 1, 1]).double(),
                entropy=entropy,
                weight=weight,
                extras=extras | flow | dict(zip(("distillation", "divergence", "drift"), learnt, strict=True)),
            )
        )
        return loss.sum / loss.count

    learnt = [distance, flow["divergence"], flow["drift"]]
    inputs = [
        (old + FAR).requires_grad_(),
        entropy.requires_grad_(not by_entropy),
        *(x.requires_grad_() for x in learnt),
    ]
    assert gradcheck(value, inputs)
    (gradient,) = torch.autograd.grad(value(*inputs), inputs[:1])
    assert (gradient[mask == 0] == 0).all()
    assert (gradient[2] == 0).all()
    assert (gradient[0] != 0).all()


def test_combination_takes_options_needs_and_sources_of_both():
    both = build({"recipe": ["gdpo", "gspo"], "epsilon_high": 5e-4, "eps": 1e-6})
    assert (both.name, both.needs) == ("gdpo+gspo", gdpo.needs | gspo.needs)
    assert gdpo.source in both.source
    assert gspo.source in both.source
    assert both.options["epsilon_low"] == 3e-4
    assert both.options["epsilon_high"] == 5e-4
    rewards = random(2, 4, 2, seed=6)
    group = Group(rewards=rewards, weights=torch.ones(2))
    assert not torch.equal(both.credit(group).advantage, gdpo.credit(group).advantage)  # eps reached both scales
    assert torch.equal(both.credit(group).advantage, gdpo(eps=1e-6).credit(group).advantage)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_options_rebuild_the_recipe(recipe):
    again = build({"recipe": recipe.name, **recipe.options})
    assert again.options == recipe.options
    assert recipe.source
    assert recipe.summary
    assert recipe.equation
    assert set(recipe.grade.split("/")) <= {"a", "b", "b*", "c"}
    assert recipe.needs <= set(NEEDS)


def test_section_without_a_recipe_is_grpo():
    assert build({}) == grpo
    assert build({"epsilon_high": 0.3}).options["epsilon_high"] == 0.3
    assert grpo.options["epsilon_high"] is None  # options make a new recipe, they do not change one


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert build({"recipe": "grpo", "eps": "1e-6"}).options["eps"] == 1e-6
    assert build({"recipe": "grpo", "beta": 0}).options["beta"] == 0.0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"recipe": "dappo"}, "unknown recipe: 'dappo'; did you mean 'dapo'.*known: grpo, dr_grpo"),
        ({"recipe": ["gdpo", "gsp"]}, "unknown recipe: 'gsp'; did you mean 'gspo'"),
        ({"recipe": []}, "unknown recipe"),
        ({"recipe": None}, "unknown recipe"),
        ({"recipe": "dapo", "epsilon_hihg": 0.3}, "recipe dapo: 'epsilon_hihg'; did you mean 'epsilon_high'"),
        ({"recipe": "cispo", "delta": 2.0}, "unknown option of recipe cispo: 'delta'"),
        ({"recipe": "grpo", "scale": "batched"}, "unknown value of scale .*'batched'; did you mean 'batch'"),
        ({"recipe": "grpo", "ddof": True}, "unknown value of ddof"),
        ({"recipe": "grpo", "epsilon_low": 1.5}, r"epsilon_low=1.5 .* outside \[0, 1\]"),
        ({"recipe": "grpo", "beta": -0.1}, "outside"),
        ({"recipe": "distribution_centric", "cap": -1.0}, r"cap=-1.0 .* outside \[0, inf\]"),
        ({"recipe": "gaussian_rank", "entropy_low": -0.2}, r"entropy_low=-0.2 .* outside \[0, inf\]"),
        ({"recipe": "grpo", "beta": float("nan")}, "outside"),
        ({"recipe": "grpo", "beta": None}, "beta=None .* is not float"),
        ({"recipe": "grpo", "delta": "high"}, "delta='high' .* is not float or null"),
    ],
)
def test_bad_section_is_refused_in_words(section, message):
    with pytest.raises(ValueError, match=message):
        build(section)


def test_loss_fn_replaces_the_loss_whole():
    """A method that is not ratio-based: its own options, and no partner that sets one of the slots it replaces."""

    def preference(rows, *, temperature: float = 2.0):
        return Loss(sum=rows.logps.sum() * temperature, count=torch.tensor(1.0))

    whole = combine([grpo, type(grpo)("preference", "test", "c", "", loss_fn=preference)])
    assert set(LOSS_SLOTS) < set(whole.sets)
    assert "epsilon_low" not in whole.options
    logps = torch.ones(4, 3, dtype=torch.float64)
    assert whole(temperature=3.0).loss(rows(logps, torch.ones(4))).sum == 9 * 3
    with pytest.raises(ValueError, match="both set surrogate"):
        combine([whole, cispo])
    with pytest.raises(ValueError, match="both set surrogate"):
        combine([dapo, whole])
    assert combine([gdpo, whole]).loss_fn is preference


def test_slots_may_drop_rollouts_and_hand_rows_to_the_loss():
    """The seams for pivots, routes and masks: keep beside the advantage, and rows that `annotate` makes of both."""

    def first_only(reward, group):
        keep = torch.zeros(reward.shape, dtype=torch.bool)
        keep[:, 0] = True
        return reward, keep

    def spread_over_tokens(advantage, group):
        return advantage.unsqueeze(2) * torch.tensor([1.0, 2.0])

    def annotate(group, advantage, keep):
        return {"worth": advantage.sum(2).flatten(), "kept": keep.flatten()}

    toy = type(grpo)("toy", "test", "c", "", advantage=first_only, modulate=spread_over_tokens, annotate=annotate)
    credit = toy.credit(Group(rewards=torch.tensor([[[3.0], [4.0]], [[5.0], [torch.nan]]]), weights=torch.ones(1)))
    assert credit.keep.tolist() == [1, 0, 1, 0]
    assert credit.advantage.tolist() == [[3, 6], [0, 0], [5, 10], [0, 0]]
    assert credit.extras["worth"].tolist() == [9, 0, 15, 0]  # after dropping
    assert credit.extras["kept"].tolist() == [True, False, True, False]
    assert not credit.advantage.requires_grad


def test_keep_of_the_modulate_slot_and_of_the_filter_are_joined():
    def second_only(advantage, group):
        return advantage, torch.tensor([[False, True], [False, True]])

    toy = type(grpo)("toy", "test", "c", "", modulate=second_only)
    rewards = torch.tensor([[[0.0], [1.0]], [[1.0], [1.0]]])
    credit = toy(filter="outcome").credit(Group(rewards=rewards, weights=torch.ones(1), outcome=0))
    assert credit.keep.tolist() == [0, 1, 0, 0]


def test_penalty_per_row_or_per_decision_goes_where_it_belongs():
    """(B, T) through the reduction, unweighted; (B,) as a mean over kept rows, whatever the reduction."""
    logps, weight = random(4, 3, seed=0), torch.full((4, 1), 5.0)
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
    given = rows(logps, torch.zeros(4), keep=keep, weight=weight)
    given.counts = Counts(rows=3, tokens=8, max_length=3)
    for reduction, share in (("token_mean", 8 / 8), ("sequence_mean", 1), ("fixed_length", 8 / 9)):
        toy = type(grpo)("toy", "test", "c", "", penalty=lambda rows: (torch.full_like(rows.logps, 2.0), {"a": (1, 1)}))
        loss = toy(reduction=reduction).loss(given)
        assert (loss.sum / loss.count).item() == pytest.approx(2 * share)
        assert loss.metrics["a"] == (1, 1)
        toy = type(grpo)("toy", "test", "c", "", penalty=lambda rows: (torch.tensor([1.0, 2.0, 9.0, 3.0]), {}))
        loss = toy(reduction=reduction).loss(given)
        assert (loss.sum / loss.count).item() == pytest.approx(2.0)


# -- flow policies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flow_grpo", {"scale": "batch", "ddof": 0, "limit": 5.0}),
        ("dance_grpo", {"eps": 1e-8, "limit": 5.0}),
    ],
)
def test_flow_recipes_are_plain_grpo_with_other_options(name, options):
    recipe, plain = RECIPES[name], grpo(epsilon_low=1e-4, **options)
    given = group_for(recipe, aligned="rollout", prompts=5, size=40)
    given.rewards[0], given.rewards[0, 0] = 0.0, 10.0
    credit, expected = recipe.credit(given), plain.credit(given)
    assert torch.equal(credit.advantage, expected.advantage)
    assert (credit.advantage == 5.0).sum() == 1  # the limit is felt
    logps = given.old_logps + 1e-4 * random(*given.old_logps.shape, seed=1)
    losses = [r.loss(rows_of(given, credit, logps)) for r in (recipe, plain)]
    assert losses[0].sum == losses[1].sum
    assert 0 < losses[0].metrics["clip_high"][0] < losses[0].metrics["clip_high"][1]


def test_values_along_a_path_are_clipped_and_held_as_the_other_flows_are():
    flow, anchored = RECIPES["flow_grpo"], RECIPES["value_anchored"]
    assert (anchored.surrogate, anchored.regularize) == (flow.surrogate, flow.regularize)
    assert anchored(beta=0.04).all_needs == {"aligned", "divergence"}


# -- forecasts ------------------------------------------------------------------------------------------------------------


def test_forecast_recipe_is_plain_grpo_with_one_scale_and_the_mean_over_decisions():
    recipe, plain = RECIPES["forecast_grpo"], grpo(scale="pooled", reduction="token_mean")
    given = group_for(recipe, holes=[1, 3])
    credit, expected = recipe.credit(given), plain.credit(given)
    assert credit.advantage.shape == (12, 5)
    assert torch.equal(credit.advantage, expected.advantage)
    logps = given.old_logps + 0.3 * random(*given.old_logps.shape, seed=1)
    losses = [r.loss(rows_of(given, credit, logps)) for r in (recipe, plain)]
    assert losses[0].sum == losses[1].sum
    assert recipe(beta=0.02).all_needs == {"aligned", "whole_batch", "divergence"}


def test_blocks_of_a_forecast_have_one_advantage_each():
    recipe = RECIPES["forecast_grpo"]
    given = group_for(recipe)
    given.segments = torch.tensor([0, 1, 0, 1, 2]).expand(12, 5)
    advantage = recipe(credit="segment").credit(given).advantage
    assert torch.equal(advantage, advantage[:, [2, 3, 0, 1, 4]])
    assert not torch.equal(advantage[:, 0], advantage[:, 1])
    whole = recipe(credit="rollout").credit(given).advantage
    assert torch.equal(whole, whole[:, :1].expand(12, 5))


def test_faker_air_is_the_mean_over_each_rollout_s_decisions_without_ratio():
    """L = mean over rows of mean over decisions (-A l + 5e-4 KL), whatever the policy that sampled."""
    recipe, logps, distance = RECIPES["faker_air"], random(4, 3, seed=0).requires_grad_(), random(4, 3, seed=1) ** 2
    advantage = torch.tensor([1.0, -0.5, 0.3, 0.0]).double()
    given = rows(logps, advantage, old_logps=logps.detach() - 9, extras={"divergence": distance})
    loss = recipe.loss(given)
    each = [
        sum(-advantage[row] * logps[row, t] + 5e-4 * distance[row, t] for t in range(length)) / length
        for row, length in enumerate((3, 2, 1, 3))
    ]
    torch.testing.assert_close(loss.sum / loss.count, sum(each) / 4)
    (slope,) = torch.autograd.grad(loss.sum / loss.count, logps)
    torch.testing.assert_close(slope[1], torch.tensor([0.5 / 2 / 4, 0.5 / 2 / 4, 0.0]).double())


# -- what a recipe needs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_each_need_that_is_not_given_is_refused_in_words(recipe):
    components = [recipe.options[option] for option in COMPONENTS if option in recipe.options]
    recipe.refuse(NEEDS, components, "the trainer")
    for need in NEEDS:
        provides = set(NEEDS) - {need}
        if need in recipe.all_needs:
            message = f"recipe {recipe.name} needs {NEEDS[need]}: the trainer cannot give that"
            with pytest.raises(ValueError, match=re.escape(message)):
                recipe.refuse(provides, components, "the trainer")
        else:
            recipe.refuse(provides, components, "the trainer")


def test_every_need_is_some_recipe_s_or_some_option_s():
    own, because = ({need for recipe in RECIPES.values() for need in recipe.needs}, [*BECAUSE.values()])
    asked = {need for options in because for need in options.values()}
    assert own | asked == set(NEEDS)
    assert not own & asked


@pytest.mark.parametrize(
    ("recipe", "option", "need"),
    [(grpo, "beta", "ref_logps"), (dapo, "entropy_coef", "entropy"), (flow_grpo, "beta", "divergence")],
    ids=["estimate", "entropy", "closed form"],
)
def test_an_option_that_asks_for_more_is_refused_in_words_once_it_is_set(recipe, option, need):
    assert recipe.all_needs == recipe(**{option: 0.1})(**{option: 0}).all_needs == recipe.needs
    assert recipe(**{option: 0.1}).all_needs == recipe.needs | {need}
    recipe.refuse(set(NEEDS) - {need}, NAMES, "the trainer")
    with pytest.raises(ValueError, match=f"{re.escape(NEEDS[need])}: the trainer cannot give that"):
        recipe(**{option: 0.1}).refuse(set(NEEDS) - {need}, NAMES, "the trainer")
    combined = combine([build({"recipe": "safety_gated"}), recipe])(**{option: 0.1})
    assert need in combined.all_needs


def test_the_beta_of_a_preference_asks_for_no_divergence():
    assert group_preference.options["beta"] == 5000
    assert group_preference.all_needs == group_preference.needs


def test_options_are_those_of_the_slots_that_are_used():
    assert "entropy_coef" not in group_preference.options
    with pytest.raises(ValueError, match="unknown option of recipe group_preference: 'reduction'"):
        group_preference(reduction="token_mean")
    assert group_preference(eps=1e-4, beta=10).options["beta"] == 10.0


@pytest.mark.parametrize(
    ("recipe", "option", "message"),
    [
        (
            "safety_gated",
            {"gate": "safty"},
            "component in gate= of recipe safety_gated: 'safty'; did you mean 'safety'",
        ),
        ("dagrpo", {"quality": "qualty"}, "component in quality= of recipe dagrpo: 'qualty'; did you mean 'quality'"),
        ("seed_grpo", {"answers": "answers"}, "component in answers= .*'answers'; did you mean 'answer'"),
        ("seed_grpo", {"answers": "final"}, r"'final' \(known: execution, quality, safety, answer\)"),
    ],
)
def test_unknown_component_is_refused_with_the_nearest_name(recipe, option, message):
    RECIPES[recipe].refuse(NEEDS, NAMES, "the trainer")
    with pytest.raises(ValueError, match=message):
        RECIPES[recipe](**option).refuse(NEEDS, NAMES, "the trainer")


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES.values() if r.needs & {"old_logps", *ASKED}], ids=lambda r: r.name
)
def test_group_that_lacks_what_credit_looks_at_is_refused_in_words(recipe):
    whole = group_for(recipe)
    recipe.credit(whole)
    for need, field in (("old_logps", "old_logps"), *((need, "model") for need in ASKED)):
        if need in recipe.needs:
            fields = {
                name: getattr(whole, name) for name in ("rewards", "weights", "mask", "old_logps", "names", "model")
            }
            lacking = Group(**(fields | {field: None}), outcome=0)
            message = f"recipe {recipe.name} needs {NEEDS[need]}, and the group has no {field}"
            with pytest.raises(ValueError, match=re.escape(message)):
                recipe.credit(lacking)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_group_without_an_outcome_works_or_is_refused_in_words(recipe):
    given = group_for(recipe)
    given.outcome = None
    looks = {
        "ngrpo", "unlikeliness", "a_grae", "dagrpo", "token_hidden_reward", "distribution_centric", "sample_routed",
    }  # fmt: skip
    if recipe.name in looks:
        with pytest.raises(ValueError, match="outcome component, and the group names none"):
            recipe.credit(given)
    else:
        assert recipe.credit(given).advantage.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_rehearsal_lets_every_recipe_through(recipe):
    recipe.rehearse(dict.fromkeys(NAMES, 1.0), "execution")


@pytest.mark.parametrize("credit", ["decision", "segment", "rollout"])
def test_a_rehearsal_lets_every_credit_of_a_forecast_through(credit):
    RECIPES["forecast_grpo"](credit=credit).rehearse(dict.fromkeys(NAMES, 1.0), "execution")


@pytest.mark.parametrize(
    ("options", "weight", "message"),
    [
        ({"recipe": "safety_gated"}, -1.0, "a gate needs weights >= 0, and one is -1"),
        ({"recipe": ["safety_gated", "token_hidden_reward"]}, -1.0, "a gate needs weights >= 0"),
        ({"recipe": "gaussian_rank", "entropy_low": 0.9}, 1.0, "entropy_low=0.9 is above entropy_high=0.8"),
        ({"recipe": ["safety_gated", "value_anchored"]}, 1.0, "is negative; shift rewards"),
    ],
)
def test_a_rehearsal_refuses_what_credit_would_refuse_later(options, weight, message):
    with pytest.raises(ValueError, match=message):
        build(options).rehearse({**dict.fromkeys(NAMES, 1.0), "quality": weight}, "execution")
