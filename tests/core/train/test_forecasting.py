"""core/train/forecasting.py: what the supervised start minimises, over how many leads, and that it learns."""

import copy

import numpy as np
import pytest
import torch

from core.app import Quantity
from core.config import ForecastRollout
from core.policy.forecast import ForecastPolicy
from core.policy.step_nets import ConvLSTM, UNet
from core.train.forecasting import imitate

QUANTITY = Quantity(("a",), ((15.0, 35.0, 75.0),))
Y, X, LEADS = 8, 12, 4


def world(rows, seed):
    """A blob on a torus moves by a wind of -1, 0 or 1 cells a lead along each axis; only the wind's map tells where to."""
    chance, y, x = np.random.default_rng(seed), np.arange(Y), np.arange(X)
    conditions, labels = [], []
    for _ in range(rows):
        north, east = chance.integers(-1, 2, size=2)
        top, middle = chance.uniform(40, 120), (chance.uniform(0, Y), chance.uniform(0, X))

        def at(lead, top=top, middle=middle, north=north, east=east):
            away = ((y - middle[0] - north * lead + Y / 2) % Y - Y / 2)[:, None] ** 2 + (
                (x - middle[1] - east * lead + X / 2) % X - X / 2
            ) ** 2
            return (5 + top * np.exp(-away / 4))[None].astype(np.float32)

        wind = np.stack([np.full((Y, X), north), np.full((Y, X), east)]).astype(np.float32)
        conditions.append(
            {
                "history": np.stack([at(0), at(0)]),
                "seen": np.ones((2, 1, Y, X), np.float32),
                "given": wind,
                "ahead": np.zeros((LEADS, 1), np.float32),
            }
        )
        labels.append(np.stack([at(lead + 1) for lead in range(LEADS)]))
    return conditions, labels


CONDITIONS, LABELS = world(200, seed=0)
ONES = [np.ones_like(label) for label in LABELS]


def policy(net=UNet, distribution="categorical", width=16):
    settings = ForecastRollout(distribution=distribution, bins=10, leads=LEADS)
    shape = ForecastPolicy.shape(CONDITIONS[0], settings, QUANTITY)
    torch.manual_seed(0)
    return ForecastPolicy(net(shape.inputs, shape.outputs, width=width), settings, QUANTITY)


def start(acting, conditions=CONDITIONS, labels=LABELS, importance=ONES, **settings):
    logged = []
    common = {"steps": 1, "batch_size": 4, "lr": 1e-3, "seed": 0, "leads": (1,)}
    imitate(acting, conditions, labels, importance, on_log=lambda *said: logged.append(said), **common | settings)
    return logged


def error(acting, conditions, labels):
    """Root mean square in s of each lead."""
    made = np.stack([fields["value"] for fields in acting.forecast(conditions, LEADS)])
    return np.sqrt(((np.log1p(made / 10) - np.log1p(np.stack(labels) / 10)) ** 2).mean((0, 2, 3, 4)))


@pytest.mark.parametrize("distribution", ["categorical", "gaussian"])
def test_a_start_learns_what_persistence_cannot_know(distribution):
    acting, (conditions, labels) = policy(distribution=distribution), world(40, seed=1)
    frozen = np.stack([c["history"][-1:].repeat(LEADS, 0) for c in conditions])
    persistence = np.sqrt(((np.log1p(frozen / 10) - np.log1p(np.stack(labels) / 10)) ** 2).mean((0, 2, 3, 4)))
    logged = start(acting, steps=120, batch_size=16, lr=4e-3, leads=(1, 2, 4))
    assert (error(acting, conditions, labels) < 0.8 * persistence).all()
    assert logged[-1][0] == 120


def test_the_first_loss_is_the_weighted_mean_over_cells_and_leads():
    for distribution in ("categorical", "gaussian"):
        acting = policy(distribution=distribution)
        importance = [np.random.default_rng(i).random(one.shape).astype(np.float32) for i, one in enumerate(LABELS)]
        before = copy.deepcopy(acting)
        loss = start(acting, importance=importance, batch_size=200, leads=(3,))[0][1]["loss"]
        given, total, weights = before.encode(CONDITIONS), 0.0, np.stack(importance)[:, :3]
        with torch.no_grad():
            for lead in range(3):
                frames, _ = before.distribution(given, lead)
                truth = torch.from_numpy(np.stack(LABELS)[:, lead])
                if distribution == "categorical":
                    bins = np.digitize(truth, before.family.bounds[0]) - 1
                    each = -frames.logps.gather(2, torch.from_numpy(bins).unsqueeze(2)).squeeze(2)
                else:
                    each = (frames.centre - (truth / 10).log1p()).square()
                total += float((each * weights[:, lead]).sum())
                given = before.advance(given, frames.state())
        assert loss == pytest.approx(total / weights.sum(), rel=1e-4)


def test_the_curriculum_has_equal_parts():
    acting, seen = policy(width=8), []
    unroll = acting.unroll
    acting.unroll = lambda given, leads: seen.append(leads) or unroll(given, leads)
    start(acting, steps=9, leads=(1, 2, 4))
    assert seen == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    seen.clear()
    start(acting, steps=4, leads=(1, 3))
    assert seen == [1, 1, 3, 3]


def test_no_gradient_flows_through_time_but_it_does_through_memory():
    """The gradient of the second frame alone is that from the first as a constant."""
    for net, flows in ((UNet, False), (ConvLSTM, True)):
        acting = policy(net, "gaussian", width=8)
        with torch.no_grad():
            acting.net.leave.weight.normal_(0, 0.1)
        given = acting.encode(CONDITIONS[:4])
        first, second = acting.unroll(given, 2)
        second.centre.sum().backward()
        through = [p.grad.clone() for p in acting.net.parameters()]
        acting.net.zero_grad()
        _, memory = acting.distribution(given, 0)
        memory = None if memory is None else tuple(part.detach() for part in memory)
        alone, _ = acting.distribution(acting.advance(given, first.state()), 1, memory)
        torch.testing.assert_close(alone.centre, second.centre)
        alone.centre.sum().backward()
        same = all(torch.equal(a, p.grad) for a, p in zip(through, acting.net.parameters(), strict=True))
        assert same != flows


@pytest.mark.parametrize("distribution", ["categorical", "gaussian"])
def test_cells_without_weight_have_no_say(distribution):
    changed = [label.copy() for label in LABELS]
    weights = [np.ones_like(label) for label in LABELS]
    for label, weight in zip(changed, weights, strict=True):
        label[:, :, :3], weight[:, :, :3] = np.nan, 0
    one, other, third = (policy(distribution=distribution, width=8) for _ in range(3))
    start(one, importance=weights, steps=3, leads=(2,))
    start(other, labels=changed, importance=weights, steps=3, leads=(2,))
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True))
    start(third, importance=[7 * weight for weight in weights], steps=3, leads=(2,))
    for a, b in zip(one.net.parameters(), third.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg="only relative weights count")


def test_batches_depend_on_the_seed_alone():
    made = [policy(width=8) for _ in range(3)]
    for acting, seed in zip(made, (0, 0, 1), strict=True):
        start(acting, steps=3, seed=seed)
    weights = [torch.cat([p.flatten() for p in acting.net.parameters()]) for acting in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_rows_are_read_when_they_are_needed():
    class Lazy:
        def __init__(self, of):
            self.of, self.read = of, 0

        def __len__(self):
            return len(self.of)

        def __getitem__(self, i):
            self.read += 1
            return self.of[i]

    lazy = [Lazy(one) for one in (CONDITIONS, LABELS, ONES)]
    start(policy(width=8), *lazy, steps=3, batch_size=5)
    assert [one.read for one in lazy] == [15, 15, 15]


def test_completions_with_fields_are_labels_too():
    fields = [np.zeros(label.shape, [("value", "f4"), ("level", "i1")]) for label in LABELS]
    for one, label in zip(fields, LABELS, strict=True):
        one["value"] = label
    one, other = policy(width=8), policy(width=8)
    start(one)
    start(other, labels=fields)
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True))


def test_what_cannot_be_learned_is_refused():
    unknown = [label.copy() for label in LABELS]
    for label in unknown:
        label[0, 0, 0, 0] = np.nan
    for given, message in (
        ({"labels": LABELS[:3]}, "200 conditions, 3 labels and 200 importances; all must be equal"),
        ({"conditions": [], "labels": [], "importance": []}, "0 conditions, 0 labels"),
        ({"leads": (1, 5), "steps": 2}, "leads=5 of the curriculum are more than the 4 that labels have"),
        ({"labels": unknown}, "4 labels are NaN and have a weight above 0; give them importance 0"),
    ):
        with pytest.raises(ValueError, match=message):
            start(policy(width=8), **given)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+ of 30; lower warmup.lr=1e\+18"):
        start(policy(width=8, distribution="gaussian"), steps=30, lr=1e18)
