"""Recipes together, on aligned policies, in mixed precision, and what they cost: every pair, through credit and loss."""

import inspect
from itertools import permutations

import pytest
import torch
from objective_fixtures import NAMES, group, group_for, rows_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.objective.composition import GIVES
from core.objective.recipes import RECIPES, build

PAIRS = [(a, b) for a, b in permutations(RECIPES.values(), 2) if not set(a.sets) & set(b.sets)]
CLASHES = [(a, b) for a, b in permutations(RECIPES.values(), 2) if set(a.sets) & set(b.sets)]
EACH = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))

# Who pushes although all rewards are equal: with which reward, and why.
PUSHES = {
    "ngrpo": ([0.7], "the virtual rollout is right, and all others are pushed away from what they did"),
    "value_anchored": ([0.7, 1.0], "a share of the value itself is added to the advantage"),
    "distribution_centric": ([0.7, 1.0], "right rollouts, here from .05 on, are imitated whatever their advantage"),
    "gaussian_rank": ([0.7, 1.0], "the entropy band looks at no reward"),
    "opmd": ([0.7, 1.0], "stale data are at a distance from the policy"),
    "asymre": ([0.7, 1.0], "the lowered baseline imitates all that was sampled"),
    "llds": ([0.7, 1.0], "rollouts of advantage 0 are protected too"),
    "faker_air": ([0.7, 1.0], "its KL draws back to the reference"),
    "diffusion_nft": ([0.7, 1.0], "at advantage 0 the velocity is drawn back to the old one, and to the reference's"),
}


# Who sets different slots and still cannot work together: credit says so.
AT_ODDS = {
    frozenset({"safety_gated", "value_anchored"}): "is negative; shift rewards"
}  # what the gate stops is below 0


def stale(given, seed=7):
    """Log-probabilities of a policy that has moved on, with gradient."""
    noise = torch.randn(given.old_logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (given.old_logps + 0.4 * noise.to(given.old_logps)).detach().requires_grad_()


def step(recipe, given):
    """Credit, loss and the gradient of the log-probabilities."""
    credit, logps = recipe.credit(given), stale(given)
    loss = recipe.loss(rows_of(given, credit, logps))
    (loss.sum / loss.count).backward()
    return credit, loss, logps.grad


def check(recipe, given):
    """Shapes and finite numbers; returns the gradient."""
    credit, loss, gradient = step(recipe, given)
    rows, decisions = given.mask.shape
    assert tuple(credit.advantage.shape) in ((rows,), (rows, decisions)), recipe.name
    assert tuple(credit.keep.shape) == (rows,), recipe.name
    assert set(credit.keep.tolist()) <= {0.0, 1.0}, recipe.name
    assert (credit.advantage[credit.keep == 0] == 0).all(), recipe.name
    assert all(len(extra) == rows for extra in credit.extras.values()), recipe.name
    numbers = [credit.advantage, loss.sum, loss.count, gradient, *credit.extras.values()]
    numbers += [part for pair in loss.metrics.values() for part in pair]
    assert all(number.isfinite().all() for number in numbers), recipe.name
    assert loss.sum.dim() == loss.count.dim() == 0, recipe.name
    assert (gradient[given.mask == 0] == 0).all(), recipe.name
    assert (gradient[credit.keep == 0] == 0).all(), recipe.name
    return gradient


# -- pairs ----------------------------------------------------------------------------------------------------------------


@EACH
def test_recipe_alone_pushes_without_spread_only_if_that_is_its_idea(recipe):
    assert (check(recipe, group_for(recipe)) != 0).any()
    for reward in (0.7, 1.0):
        gradient = check(recipe, group_for(recipe, constant=reward))
        assert (gradient != 0).any() == (reward in PUSHES.get(recipe.name, ([],))[0])


@EACH
def test_recipes_that_touch_different_slots_combine(recipe):
    """In both orders, as a config names them: all slots, needs and options of both, and a step that makes sense."""
    for first, second in PAIRS:
        if first is not recipe:
            continue
        both = build({"recipe": [first.name, second.name]})
        assert set(both.sets) == set(first.sets) | set(second.sets)
        assert both.needs == first.needs | second.needs
        for slot in both.sets:
            assert getattr(both, slot) is getattr(first if slot in first.sets else second, slot)
        assert build({"recipe": [first.name, second.name], **both.options}).options == both.options
        if refusal := AT_ODDS.get(frozenset({first.name, second.name})):
            with pytest.raises(ValueError, match=refusal):
                both.credit(group_for(both))
            continue
        if first.name > second.name:
            continue  # the same slots: the same step
        assert check(both, group_for(both)).any(), both.name
        if not {first.name, second.name} & set(PUSHES):
            for reward in (0.7, 1.0):
                assert not check(both, group_for(both, constant=reward)).any(), both.name


def test_option_of_two_slots_has_one_default():
    """Or `eps: 1e-4` in a config, which is the default of one, would change the other."""
    for recipe in [*RECIPES.values(), *(build({"recipe": [a.name, b.name]}) for a, b in PAIRS)]:
        defaults = {}
        for slot in (getattr(recipe, slot) for slot in recipe.slots):
            for name, parameter in inspect.signature(slot).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    assert defaults.setdefault(name, parameter.default) == parameter.default, f"{recipe.name}: {name}"


@pytest.mark.parametrize("first", RECIPES.values(), ids=list(RECIPES))
def test_recipes_that_set_the_same_slot_are_refused_by_name(first):
    for _, second in (pair for pair in CLASHES if pair[0] is first):
        slots = ", ".join(slot for slot in first.sets if slot in second.sets)
        with pytest.raises(ValueError, match=f"recipes {first.name} and {second.name} both set {slots}; keep one"):
            build({"recipe": [first.name, second.name]})


def test_three_recipes_combine_and_the_clashing_two_of_them_are_named():
    three = build({"recipe": ["llds", "safety_gated", "dagrpo"]})
    assert set(three.sets) == {"aggregate", "modulate", "annotate", "penalty"}
    assert set(three.grade.split("/")) == {"a", "b", "c"}
    check(three, group())
    with pytest.raises(ValueError, match="recipes safety_gated and gdpo both set aggregate"):
        build({"recipe": ["safety_gated", "llds", "gdpo"]})


# -- aligned policies -----------------------------------------------------------------------------------------------------

REFUSED = {
    ("mc_grpo", "decision"): "one reward per rollout, not per decision",
    ("value_anchored", "rollout"): "need one reward per decision",
    ("forecast_grpo", "rollout"): "credit=decision needs one reward per decision",
}
NEVER_ALIGNED = {"distribution_centric", "token_hidden_reward", "sample_routed"}
FLOWS_ALONE = {"grpo_guard", "diffusion_nft", "group_preference"}


@pytest.mark.parametrize("holes", [None, [1, 3]], ids=["all steps", "observed cells"])
@pytest.mark.parametrize("rewards", ["rollout", "decision"])
@EACH
def test_which_recipe_runs_on_an_aligned_policy(recipe, rewards, holes):
    """Unobserved cells carry no loss, and their rewards are NaN where each decision has one."""
    size = 5 if "extra_rollout" in recipe.needs else 4
    given = group(aligned=rewards, holes=holes, size=size)
    if refusal := REFUSED.get((recipe.name, rewards)):
        with pytest.raises(ValueError, match=refusal):
            recipe.credit(given)
        return
    assert (check(recipe, given) != 0).any()
    per_decision = rewards == "decision" or recipe.name in ("token_hidden_reward", "distribution_centric")
    assert recipe.credit(given).advantage.dim() == (2 if per_decision else 1)


@EACH
@pytest.mark.parametrize(("kind", "refused"), [("flow", set()), ("forecast", FLOWS_ALONE)])
def test_which_recipe_an_aligned_policy_refuses(recipe, kind, refused):
    if recipe.name in NEVER_ALIGNED | refused:
        with pytest.raises(ValueError, match=f"recipe {recipe.name} needs .*: a {kind} cannot give that"):
            recipe.refuse(GIVES[kind], NAMES, f"a {kind}")
    else:
        recipe.refuse(GIVES[kind], NAMES, f"a {kind}")


@EACH
def test_equal_rewards_for_all_decisions_are_one_reward_for_the_rollout(recipe):
    """Where both run: the same advantage at every decision, the same loss."""
    if any(name == recipe.name for name, _ in REFUSED):
        return
    one, each = group(aligned="rollout", prompts=4), group(aligned="decision", prompts=4)
    each.rewards = one.rewards.unsqueeze(3).expand_as(each.rewards).clone()
    (one_credit, one_loss, one_gradient), (each_credit, each_loss, each_gradient) = (
        step(recipe, one),
        step(recipe, each),
    )
    advantage = one_credit.advantage if one_credit.advantage.dim() == 2 else one_credit.advantage.unsqueeze(1)
    torch.testing.assert_close(each_credit.advantage, advantage.expand_as(each_credit.advantage), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(each_loss.sum, one_loss.sum, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(each_gradient, one_gradient, rtol=1e-6, atol=1e-9)


# -- cost, devices, precision ---------------------------------------------------------------------------------------------

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "index", "is_nonzero", "unique", "item"}


class Operations(TorchDispatchMode):
    """Every torch operation by name, and those that make a tensor without saying on which device."""

    def __init__(self):
        super().__init__()
        self.names, self.homeless = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        self.names.append(name)
        result = operation(*args, **kwargs)
        given = any(isinstance(value, torch.Tensor) for value in tree_leaves((args, kwargs)))
        if isinstance(result, torch.Tensor) and not given and kwargs.get("device") is None:
            self.homeless.append(name)
        return result


def operations(recipe, given):
    """Of credit, and of loss and backward."""
    with Operations() as credited:
        credit = recipe.credit(given)
    logps = stale(given)
    rows = rows_of(given, credit, logps)
    with Operations() as lost:
        recipe.loss(rows).sum.backward()
    return credited, lost


@EACH
def test_nothing_is_done_row_by_row(recipe):
    """As many operations for twice the prompts, rollouts or decisions; only sums along a trajectory take one pass more."""
    small = {"prompts": 3, "size": 5, "steps": 5}
    base = operations(recipe, group_for(recipe, **small))
    for change in ({"prompts": 6}, {"size": 11}, {"steps": 10}):
        more = operations(recipe, group_for(recipe, **small | change))
        grown = [len(b.names) - len(a.names) for a, b in zip(base, more, strict=True)]
        if recipe.name == "value_anchored" and "steps" in change:
            again = operations(recipe, group_for(recipe, **small | {"steps": 20}))
            assert grown == [len(b.names) - len(a.names) for a, b in zip(more, again, strict=True)]
            assert grown[1] == 0
            assert 0 < grown[0] < 12
        else:
            assert grown == [0, 0]


@EACH
def test_loss_never_waits_for_the_device_and_credit_seldom(recipe):
    """Operations whose result Python must see stop the queue of a GPU: none per micro-batch, few per generation batch."""
    credited, lost = operations(recipe, group_for(recipe))
    assert not WAITS & set(lost.names)
    assert sum(name in WAITS for name in credited.names) < 16


@EACH
def test_no_tensor_is_made_away_from_its_data(recipe):
    """What is made from nothing says on which device; random numbers are drawn on the CPU, alike on all ranks."""
    credited, lost = operations(recipe, group_for(recipe))
    assert set(credited.homeless) <= {"rand"}
    assert not lost.homeless


@EACH
def test_masks_of_any_type_and_logps_of_half_precision_are_taken(recipe):
    given = group_for(recipe)
    credit, logps = recipe.credit(given), stale(given).detach()
    plain = recipe.loss(rows_of(given, credit, logps))
    for kind in (torch.bool, torch.float32, torch.int32):
        loss = recipe.loss(rows_of(given, credit, logps, mask=given.mask.to(kind)))
        torch.testing.assert_close(loss.sum, plain.sum)
        torch.testing.assert_close(loss.count, plain.count)
        masked = group_for(recipe)
        masked.mask = masked.model.mask = masked.mask.to(kind)
        again = recipe.credit(masked)
        assert torch.equal(again.advantage, credit.advantage)
        for name, extra in credit.extras.items():
            assert torch.equal(again.extras[name], extra), name
    half = logps.bfloat16().requires_grad_()
    loss = recipe.loss(rows_of(given, credit, half, old_logps=given.old_logps.bfloat16()))
    loss.sum.backward()
    assert half.grad.isfinite().all()
    torch.testing.assert_close((loss.sum / loss.count).double(), plain.sum / plain.count, rtol=0.1, atol=0.05)


@EACH
def test_float32_credit_is_close_to_float64(recipe):
    single, double = (recipe.credit(group_for(recipe, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert single.advantage.dtype == torch.float32
    assert torch.equal(single.keep.double(), double.keep)
    torch.testing.assert_close(single.advantage.double(), double.advantage, rtol=1e-3, atol=1e-4)
    for name, extra in single.extras.items():
        torch.testing.assert_close(extra.double(), double.extras[name].double(), rtol=1e-4, atol=1e-5)
