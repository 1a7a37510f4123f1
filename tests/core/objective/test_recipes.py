"""The family as a whole: gradients, composition, refusals. Every test walks over all recipes that there are."""

from itertools import permutations

import pytest
import torch
from torch.autograd import gradcheck

from core.objective.composition import LOSS_SLOTS, combine
from core.objective.group import Group
from core.objective.recipes import RECIPES, build, cispo, dapo, gdpo, grpo, gspo
from core.objective.rows import Counts, Loss, Rows

PAIRS = [(a, b) for a, b in permutations(RECIPES.values(), 2) if not set(a.sets) & set(b.sets)]
CLASHES = [(a, b) for a, b in permutations(RECIPES.values(), 2) if set(a.sets) & set(b.sets)]


def names(pairs):
    return [f"{a.name}-{b.name}" for a, b in pairs]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(logps, advantage, **fields):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    return Rows(logps=logps, mask=mask, advantage=advantage, counts=Counts(rows=4, tokens=9, max_length=3), **fields)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_gradient_by_finite_differences(recipe, beta):
    """Some ratios inside the clip, some outside. A capped weight has no gradient, so there all are above the cap."""
    if "delta" not in recipe.options:
        recipe = recipe(epsilon_high=0.01)
    logps, spread = random(4, 3, seed=0), 0.3 if recipe is not gspo else 3e-4
    old, ref, advantage = logps + spread * random(4, 3, seed=1), logps + random(4, 3, seed=2), random(4, seed=3)
    metrics = {}

    def value(logps, entropy):
        fields = {"old_logps": old, "ref_logps": ref, "entropy": entropy}
        loss = recipe(beta=beta, entropy_coef=0.1).loss(rows(logps, advantage, **fields))
        metrics.update(loss.metrics)
        return loss.sum / loss.count

    assert gradcheck(value, (logps.requires_grad_(), random(4, 3, seed=4).requires_grad_()))
    assert metrics["clip_high"][0] > 0


@pytest.mark.parametrize(("first", "second"), [*PAIRS, *[(r, r) for r in RECIPES.values()]])
def test_recipes_that_touch_different_slots_combine(first, second):
    """Any such pair, and each recipe alone: finite, right shapes, zero gradient on constant rewards."""
    both = first if first is second else build({"recipe": [first.name, second.name]})
    assert set(both.sets) == set(first.sets) | set(second.sets)
    for slot in both.sets:
        assert getattr(both, slot) is getattr(first if slot in first.sets else second, slot)
    for rewards, constant in ((random(2, 2, 3, seed=5), False), (torch.full((2, 2, 3), 0.7).double(), True)):
        credit = both.credit(Group(rewards=rewards, weights=torch.ones(3)))
        assert credit.advantage.shape == credit.keep.shape == (4,)
        logps = random(4, 3, seed=0).requires_grad_()
        loss = both.loss(rows(logps, credit.advantage, keep=credit.keep, old_logps=logps.detach() - 0.1))
        loss.sum.backward()
        assert logps.grad.isfinite().all()
        assert (logps.grad == 0).all() if constant else (logps.grad != 0).any()


@pytest.mark.parametrize(("first", "second"), CLASHES, ids=names(CLASHES))
def test_recipes_that_set_the_same_slot_are_refused_by_name(first, second):
    slot = next(slot for slot in first.sets if slot in second.sets)
    with pytest.raises(ValueError, match=f"recipes {first.name} and {second.name} both set .*{slot}"):
        build({"recipe": [first.name, second.name]})


def test_combination_takes_options_needs_and_sources_of_both():
    both = build({"recipe": ["gdpo", "gspo"], "epsilon_high": 5e-4, "eps": 1e-6})
    assert (both.name, both.needs) == ("gdpo+gspo", gspo.needs)
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
    assert recipe.grade in ("a", "b", "c")


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
    """The seam for pivots, routes and masks: (advantage, keep, extras) from the advantage or modulate slot."""

    def first_only(reward, group):
        keep = torch.zeros(reward.shape, dtype=torch.bool)
        keep[:, 0] = True
        return reward, keep, {"route": torch.arange(reward.numel())}

    def spread_over_tokens(advantage, group):
        return advantage.unsqueeze(2) * torch.tensor([1.0, 2.0])

    recipe = type(grpo)("toy", "test", "c", "", advantage=first_only, modulate=spread_over_tokens)
    credit = recipe.credit(Group(rewards=torch.tensor([[[3.0], [4.0]], [[5.0], [torch.nan]]]), weights=torch.ones(1)))
    assert credit.keep.tolist() == [1, 0, 1, 0]
    assert credit.advantage.tolist() == [[3, 6], [0, 0], [5, 10], [0, 0]]
    assert credit.extras["route"].tolist() == [0, 1, 2, 3]
    assert not credit.advantage.requires_grad
