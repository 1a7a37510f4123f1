"""Reductions: what each divides by, that the exact ones merge over any split, and that dropped rows leave no trace."""

import math

import pytest
import torch
from objective_fixtures import LOSSES

from core.objective.recipes import RECIPES, build, grpo, llds
from core.objective.reduction import add_row_mean, reduce_loss
from core.objective.rows import Counts, Loss, Rows

EACH = pytest.mark.parametrize("recipe", LOSSES.values(), ids=list(LOSSES))
EXACT = ("token_mean", "sequence_mean", "fixed_length")
LOCAL = ("token_mean_local", "sequence_mean_local")
LENGTHS = [5, 1, 3, 0, 4, 2, 5, 3, 1, 4]
ROW_FIELDS = ("logps", "mask", "advantage", "old_logps", "ref_logps", "keep", "entropy", "weight")


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
    }
    return {
        "logps": logps,
        "mask": mask,
        "advantage": random(10, 5) if decisions else random(10),
        "old_logps": logps + 0.3 * random(10, 5),
        "ref_logps": logps + 0.3 * random(10, 5),
        "keep": keep,
        "entropy": random(10, 5).abs(),
        "weight": random(10, 1).abs(),
        "extras": extras,
        "counts": Counts(rows=keep.sum().item(), tokens=(mask * keep.unsqueeze(1)).sum().item(), max_length=6),
    }


def take(fields, indices):
    extras = {name: value[indices] for name, value in fields["extras"].items()}
    return fields | {name: fields[name][indices] for name in ROW_FIELDS} | {"extras": extras}


def gradient(recipe, fields, parts, counts=None):
    """The gradient that accumulates over the parts, with respect to log-probabilities, entropies and teacher's distance.

    counts: of the update that each part belongs to, if it is not the whole.
    """
    logps, entropy = (fields[name].clone().requires_grad_() for name in ("logps", "entropy"))
    distance = fields["extras"]["distillation"].clone().requires_grad_()
    given = fields | {"logps": logps, "entropy": entropy, "extras": fields["extras"] | {"distillation": distance}}
    for part in parts:
        loss = recipe.loss(Rows(**(take(given, part) | ({"counts": counts} if counts else {}))))
        assert loss.local is False
        (loss.sum / loss.count).backward()
    return torch.stack([logps.grad, entropy.grad, torch.zeros_like(logps) if distance.grad is None else distance.grad])


SPLITS = [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[3], [9, 0, 5], [1, 8, 2, 7, 4, 6]], [[i] for i in range(10)]]


@pytest.mark.parametrize("reduction", EXACT)
@EACH
def test_any_split_into_micro_batches_gives_the_full_gradient(recipe, reduction):
    recipe = recipe(reduction=reduction, beta=0.1, entropy_coef=0.05)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        fields = update(dtype, keep=[1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
        whole = gradient(recipe, fields, [list(range(10))])
        assert whole.abs().max() > 0.01
        for split in SPLITS:
            torch.testing.assert_close(gradient(recipe, fields, split), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("reduction", EXACT)
@EACH
def test_several_updates_of_a_generation_batch_average_to_the_whole(recipe, reduction):
    """Rows shared out unevenly over four updates, counts evenly; the second batch has fewer kept rows than updates."""
    recipe = recipe(reduction=reduction, beta=0.1, entropy_coef=0.05)
    for keep in (None, [0, 0, 0, 1, 0, 0, 1, 0, 0, 0]):
        fields = update(keep=keep)
        whole, counts = gradient(recipe, fields, [list(range(10))]), fields["counts"]
        shared = Counts(rows=counts.rows / 4, tokens=counts.tokens / 4, max_length=counts.max_length)
        updates = [[0, 1], [2], [3, 4, 5, 6, 7, 8], [9]]
        each = sum(gradient(recipe, fields, [part], shared) for part in updates) / 4
        assert whole.abs().max() > 0.001
        torch.testing.assert_close(each, whole, rtol=0, atol=1e-12)


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
    recipe = recipe(reduction=reduction, beta=0.1)
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
    recipe = recipe(beta=0.1, entropy_coef=0.1)
    clean = update(keep=[1, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    clean["weight"] = clean["weight"].expand(10, 5).clone()
    dirty = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in clean.items()}
    dirty["extras"] = {name: value.clone() for name, value in clean["extras"].items()}
    dirty["logps"][1], dirty["old_logps"][1] = 900.0, -900.0
    for values in [*(dirty[name] for name in ("weight", "ref_logps", "entropy")), *dirty["extras"].values()]:
        values[1] = math.nan
    for values in [*(dirty[name] for name in ROW_FIELDS), *dirty["extras"].values()]:
        if values.shape == (10, 5) and values.is_floating_point():
            values[clean["mask"] == 0] = math.nan
    losses = []
    for fields in (clean, dirty):
        fields["logps"].requires_grad_(), fields["entropy"].requires_grad_()
        losses.append(recipe.loss(Rows(**fields)))
        losses[-1].sum.backward()
    assert losses[0].sum == losses[1].sum
    for name in ("logps", "entropy"):
        assert torch.equal(clean[name].grad, dirty[name].grad)
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
        extras = {
            name: value[:rows, :decisions] if value.dim() == 2 else value[:rows]
            for name, value in fields["extras"].items()
        }
        for name in ROW_FIELDS:
            fields[name] = fields[name][:rows, :decisions] if fields[name].dim() == 2 else fields[name][:rows]
        loss = recipe(beta=0.1).loss(Rows(**(fields | {"extras": extras, "weight": None})))
        assert (loss.sum / loss.count).item() == 0


def test_rows_that_do_not_fit_are_refused():
    fields = update()
    for name, wrong in (("advantage", torch.ones(3)), ("keep", torch.ones(10, 5)), ("ref_logps", torch.ones(10, 4))):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            Rows(**(fields | {name: wrong}))


@pytest.mark.parametrize("options", [{"recipe": "grpo", "reduction": "mean"}])
def test_unknown_reduction_is_refused(options):
    with pytest.raises(ValueError, match="token_mean"):
        build(options)
