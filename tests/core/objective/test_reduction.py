"""Reductions: what each divides by, that the exact ones merge over any split, that chunks of decisions do, and that dropped
rows leave no trace."""

import math

import pytest
import torch
from objective_fixtures import LOSSES, fitted, flow_extras

from core.objective.recipes import RECIPES, build, group_preference, grpo, llds
from core.objective.reduction import add_row_mean, reduce_loss
from core.objective.rows import Counts, Loss, Rows

EACH = pytest.mark.parametrize("recipe", LOSSES.values(), ids=list(LOSSES))
EXACT = ("token_mean", "sequence_mean", "fixed_length")
LOCAL = ("token_mean_local", "sequence_mean_local")
LENGTHS = [5, 1, 3, 0, 4, 2, 5, 3, 1, 4]
GROUPS = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
ROW_FIELDS = ("logps", "mask", "advantage", "old_logps", "ref_logps", "keep", "group_id", "entropy", "weight")
LEARNT = ("distillation", "divergence", "drift", "velocity")  # extras with gradient


def update(dtype=torch.float64, keep=None, decisions=False):
    """Ten ragged rows of an update, off-policy, with a reference, an entropy, a weight and what recipes ask for."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = (torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)).to(torch.long)
    keep = torch.ones(10, dtype=dtype) if keep is None else torch.tensor(keep, dtype=dtype)
    logps = -random(10, 5).abs()
    extras = {
        "protected": random(10).abs(),
        "entropy_gate": random(10),
        "entropy_bound": random(10).abs(),
        "distillation_weight": mask * random(10, 5).relu(),
        "distillation": random(10, 5).abs(),
        **flow_extras(random(10, 5)),
    }
    return {
        "logps": logps,
        "mask": mask,
        "advantage": random(10, 5) if decisions else random(10),
        "old_logps": logps + 0.3 * random(10, 5),
        "ref_logps": logps + 0.3 * random(10, 5),
        "keep": keep,
        "group_id": torch.tensor(GROUPS),
        "entropy": random(10, 5).abs(),
        "weight": random(10, 1).abs(),
        "extras": extras,
        "counts": Counts(rows=keep.sum().item(), tokens=(mask * keep.unsqueeze(1)).sum().item(), max_length=6),
    }


def take(fields, indices):
    names = [name for name in (*ROW_FIELDS, "lengths") if name in fields]
    extras = {name: value[indices] for name, value in fields["extras"].items()}
    return fields | {name: fields[name][indices] for name in names} | {"extras": extras}


def chunk(fields, steps):
    """Some of the decisions of all rows."""

    def part(value):
        return value[:, list(steps)] if value.shape[:2] == (10, 5) else value

    extras = {name: part(value) for name, value in fields["extras"].items()}
    own = {name: part(fields[name]) for name in ROW_FIELDS}
    return fields | own | {"extras": extras, "lengths": fields["mask"].sum(1)}


def gradient(recipe, fields, parts, counts=None):
    """The gradient that accumulates over the parts, with respect to log-probabilities, entropies and what else has one.

    counts: of the update that each part belongs to, if it is not the whole.
    """
    given, leaves = with_leaves(fields)
    for part in parts:
        loss = recipe.loss(Rows(**(take(given, part) | ({"counts": counts} if counts else {}))))
        assert loss.local is False
        (loss.sum / loss.count).backward()
    return gathered(leaves)


def with_leaves(fields):
    """The fields with gradients, and the tensors that will have them."""
    own = {name: fields[name].clone().requires_grad_() for name in ("logps", "entropy")}
    extras = {name: fields["extras"][name].clone().requires_grad_() for name in LEARNT}
    return fields | own | {"extras": fields["extras"] | extras}, [*own.values(), *extras.values()]


def gathered(leaves):
    return torch.cat([(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten() for leaf in leaves])


SPLITS = [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[3], [9, 0, 5], [1, 8, 2, 7, 4, 6]], [[i] for i in range(10)]]
OF_GROUPS = [
    [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]],
    [[4, 3], [8, 0, 2, 9, 1], [7, 5, 6]],
    [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]],
]


def splits(recipe):
    return OF_GROUPS if "whole_groups" in recipe.needs else SPLITS


@pytest.mark.parametrize("reduction", EXACT)
@EACH
def test_any_split_into_micro_batches_gives_the_full_gradient(recipe, reduction):
    recipe = fitted(recipe, reduction=reduction, beta=0.1, entropy_coef=0.05, epsilon_low=0.2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        fields = update(dtype, keep=[1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
        whole = gradient(recipe, fields, [list(range(10))])
        assert whole.abs().max() > 0.005
        for split in splits(recipe):
            torch.testing.assert_close(gradient(recipe, fields, split), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("reduction", EXACT)
@EACH
def test_several_updates_of_a_generation_batch_average_to_the_whole(recipe, reduction):
    """Rows shared out unevenly over four updates, counts evenly; the second batch has fewer kept rows than updates."""
    recipe = fitted(recipe, reduction=reduction, beta=0.1, entropy_coef=0.05)
    for keep in (None, [0, 0, 0, 1, 0, 1, 0, 1, 0, 0]):
        fields = update(keep=keep)
        whole, counts = gradient(recipe, fields, [list(range(10))]), fields["counts"]
        shared = Counts(rows=counts.rows / 4, tokens=counts.tokens / 4, max_length=counts.max_length)
        updates = [[0, 1, 2], [], [3, 4, 5, 6, 7], [8, 9]]
        if "whole_groups" not in recipe.needs:
            updates = [[0, 1], [2], [3, 4, 5, 6, 7, 8], [9]]
        each = sum(gradient(recipe, fields, [part], shared) for part in updates) / 4
        assert whole.abs().max() > 0.001
        torch.testing.assert_close(each, whole, rtol=0, atol=1e-12)


CHUNKS = [[[0, 1], [2, 3, 4]], [[4, 0, 2], [1, 3]], [[t] for t in range(5)]]


def in_chunks(recipe, fields, chunks):
    """Gradient, sum, count and added metrics of all rows, taken some decisions at a time."""
    given, leaves = with_leaves(fields)
    losses = [recipe.loss(Rows(**(chunk(given, steps) if chunks[1:] else given))) for steps in chunks]
    sum(loss.sum / loss.count for loss in losses).backward()
    metrics = {
        name: torch.stack([sum(parts) for parts in zip(*(loss.metrics[name] for loss in losses), strict=True)])
        for name in losses[0].metrics
        if name != "ratio_deviation_max"  # whose mean is over micro-batches
    }
    assert len({loss.count.item() for loss in losses}) == 1
    return (gathered(leaves), sum(loss.sum for loss in losses).detach(), losses[0].count), metrics


@pytest.mark.parametrize("reduction", EXACT + LOCAL)
@pytest.mark.parametrize(
    "recipe", [r for r in LOSSES.values() if "whole_rollouts" not in r.needs], ids=lambda r: r.name
)
def test_chunks_of_decisions_add_up_to_the_whole(recipe, reduction):
    """Local reductions too, whose counts are then those of the rows at hand."""
    recipe = fitted(recipe, reduction=reduction, beta=0.1, entropy_coef=0.05, epsilon_low=0.2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        fields = update(dtype, keep=[1, 1, 0, 1, 1, 1, 0, 1, 1, 1], decisions=reduction == "token_mean")
        whole, metrics = in_chunks(recipe, fields, [range(5)])
        assert whole[0].abs().max() > 0.01
        for chunks in CHUNKS:
            merged, measured = in_chunks(recipe, fields, chunks)
            torch.testing.assert_close(merged, whole, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(measured, metrics, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep", [None, [1, 1, 0, 1, 1, 1, 0, 1, 1, 1]], ids=["all kept", "some dropped"])
@pytest.mark.parametrize("reduction", EXACT + LOCAL)
@EACH
def test_lengths_of_whole_rows_change_nothing(recipe, reduction, keep):
    recipe, fields = fitted(recipe, reduction=reduction), update(keep=keep)
    if keep is None:
        fields["keep"] = None
    plain, told = (recipe.loss(Rows(**fields | own)) for own in ({}, {"lengths": fields["mask"].sum(1)}))
    assert (plain.sum, plain.count) == (told.sum, told.count)


def test_chunks_of_a_loss_that_needs_whole_rollouts_do_not_add_up():
    """Which is why it says so: -log sigmoid of a part is not a part of -log sigmoid."""
    fields = update()
    whole, chunks = (in_chunks(group_preference, fields, steps) for steps in ([range(5)], CHUNKS[0]))
    assert (whole[0][0] - chunks[0][0]).abs().max() > 0.01


@pytest.mark.parametrize("recipe", [grpo, llds], ids=["grpo", "llds"])
@pytest.mark.parametrize("reduction", LOCAL)
def test_local_reductions_say_that_they_depend_on_the_split(recipe, reduction):
    """A term per row, too, is then averaged over the rows at hand."""
    fields, recipe = update(keep=[1, 1, 0, 1, 1, 1, 0, 1, 1, 1]), recipe(reduction=reduction)
    losses = [recipe.loss(Rows(**take(fields, part))) for part in SPLITS[1]]
    assert all(loss.local for loss in losses)
    whole = recipe.loss(Rows(**fields))
    merged = sum(loss.sum / loss.count for loss in losses) / len(losses)
    assert abs(merged - whole.sum / whole.count) > 1e-3


def test_only_bnpo_is_local_unless_it_is_asked_for():
    fields = update()
    assert [name for name, recipe in RECIPES.items() if recipe.loss(Rows(**fields)).local] == ["bnpo"]


@pytest.mark.parametrize(("local", "mean"), [(False, (1.0 + 4.0) / 8), (True, (1.0 + 4.0) / 2)])
def test_row_mean_by_hand(local, mean):
    """Two of the three rows at hand are kept, of eight in the update. What a dropped row says does not matter."""
    keep, logps = torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3, 2)
    counts = Counts(rows=torch.tensor(8.0), tokens=20, max_length=2)
    rows = Rows(logps=logps, mask=torch.ones(3, 2), advantage=torch.zeros(3), counts=counts, keep=keep)
    loss = Loss(sum=torch.tensor(3.0), count=torch.tensor(20.0), local=local)
    per_row = torch.tensor([1.0, math.nan, 4.0])
    added = add_row_mean(loss, per_row, rows)
    torch.testing.assert_close(added.sum / added.count, torch.tensor(3 / 20 + mean))
    assert (added.local, added.count.item()) == (local, 20)
    rows.keep, rows.counts = torch.zeros(3), Counts(rows=0, tokens=0, max_length=2)
    assert add_row_mean(loss, per_row, rows).sum == loss.sum
    rows.keep = None
    assert add_row_mean(loss, torch.ones(3), rows).sum == 3 + (1 if local else 3) * 20


@pytest.mark.parametrize("reduction", EXACT + LOCAL)
@EACH
def test_keep_zero_equals_removing_the_row(recipe, reduction):
    recipe = fitted(recipe, reduction=reduction, beta=0.1)
    decisions = reduction == "token_mean"
    dropped = update(keep=[1, 0, 1, 1, 1, 0, 0, 1, 1, 1], decisions=decisions)
    removed = take(dropped, dropped["keep"].bool()) | {"keep": None}
    losses = [recipe.loss(Rows(**fields)) for fields in (dropped, removed)]
    torch.testing.assert_close(losses[0].sum / losses[0].count, losses[1].sum / losses[1].count, rtol=1e-12, atol=0)
    for name, (total, count) in losses[0].metrics.items():
        if name != "ratio_deviation_max":
            torch.testing.assert_close(total / count, torch.div(*losses[1].metrics[name]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("reduction", "total", "count"),
    [
        ("token_mean", 1 + 2 + 4, 9),
        ("sequence_mean", 1.5 + 4, 3),
        ("fixed_length", 1 + 2 + 4, 3 * 5),
        ("token_mean_local", 1 + 2 + 4, 3),
        ("sequence_mean_local", 1.5 + 4, 2),
    ],
)
def test_closed_form(reduction, total, count):
    per_decision = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    mask, counts = torch.tensor([[1, 1], [1, 0]]), Counts(rows=3, tokens=9, max_length=5)
    rows = Rows(logps=per_decision, mask=mask, advantage=torch.ones(2), counts=counts)
    loss = reduce_loss(per_decision, rows, reduction=reduction)
    assert (loss.sum.item(), loss.count.item(), loss.local) == (total, count, reduction.endswith("_local"))


@pytest.mark.parametrize("reduction", EXACT + LOCAL)
def test_update_without_a_kept_decision_is_zero(reduction):
    fields = update(keep=[0] * 10)
    loss = grpo(reduction=reduction).loss(Rows(**fields))
    assert (loss.sum / loss.count).item() == 0


@EACH
def test_garbage_in_padding_and_dropped_rows_does_not_reach_the_loss(recipe):
    """NaN in an unobserved cell, an overflow in a dropped row, NaN in what goes with them: same value, gradient, metrics."""
    recipe = fitted(recipe, beta=0.1, entropy_coef=0.1)
    clean = update(keep=[1, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    clean["weight"] = clean["weight"].expand(10, 5).clone()
    dirty = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in clean.items()}
    dirty["extras"] = {name: value.clone() for name, value in clean["extras"].items()}
    dirty["logps"][1], dirty["old_logps"][1] = 900.0, -900.0
    for values in [*(dirty[name] for name in ("weight", "ref_logps", "entropy")), *dirty["extras"].values()]:
        values[1] = math.nan
    for values in [*(dirty[name] for name in ROW_FIELDS), *dirty["extras"].values()]:
        if values.shape[:2] == (10, 5) and values.is_floating_point():
            values[clean["mask"] == 0] = math.nan
    losses, gradients = [], []
    for fields in (clean, dirty):
        given, leaves = with_leaves(fields)
        losses.append(recipe.loss(Rows(**given)))
        losses[-1].sum.backward()
        gradients.append(gathered(leaves))
    assert losses[0].sum == losses[1].sum
    assert torch.equal(*gradients)
    assert losses[0].metrics == losses[1].metrics


@EACH
def test_weight_of_a_whole_dropped_row_may_be_nan(recipe):
    fields = update(keep=[1, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    clean = recipe.loss(Rows(**fields))
    fields["weight"][1] = math.nan
    assert recipe.loss(Rows(**fields)).sum == clean.sum


@EACH
def test_micro_batch_without_rows_or_without_decisions_is_zero(recipe):
    for rows, decisions in ((0, 5), (10, 0)):
        fields = update()
        fields = take(chunk(fields, range(decisions)), list(range(rows))) | {"weight": None}
        loss = fitted(recipe, beta=0.1).loss(Rows(**fields))
        assert (loss.sum / loss.count).item() == 0


def test_extras_are_quiet_where_no_loss_is_carried():
    fields = update(keep=[1, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    rows = Rows(**fields)
    for name, elsewhere in (("dt", 1.0), ("velocity", 0.0)):
        values, used = rows.per_decision(name, elsewhere), rows.loss_mask.bool()
        assert torch.equal(values[used], fields["extras"][name][used])
        assert (values[~used] == elsewhere).all()


def test_rows_that_do_not_fit_are_refused():
    fields = update()
    shapes = {"advantage": (3,), "keep": (10, 5), "ref_logps": (10, 4), "lengths": (10, 5)}
    for name, wrong in ((name, torch.ones(shape)) for name, shape in shapes.items()):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            Rows(**(fields | {name: wrong}))


@pytest.mark.parametrize("options", [{"recipe": "grpo", "reduction": "mean"}])
def test_unknown_reduction_is_refused(options):
    with pytest.raises(ValueError, match="token_mean"):
        build(options)
