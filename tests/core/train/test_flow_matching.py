"""core/train/flow_matching.py: on a net of one weight by closed form, on TinyFlow by what it learns."""

import copy
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from core.config import FlowRollout, Model
from core.policy import adapter
from core.policy.flow import FlowPolicy
from core.policy.kernel import STANDARD, Centred
from core.policy.tiny_flow import TinyFlow
from core.train.flow_matching import imitate, straighten


class Constant(nn.Module):
    """v = one number, over vectors of 4, whatever x is; remembers what it was asked."""

    def __init__(self, start=0.0, prior=STANDARD):
        super().__init__()
        self.number, self.start = nn.Parameter(torch.tensor(start)), prior
        self.encoded, self.asked = [], []

    def encode(self, conditions):
        self.encoded.append(list(conditions))
        return {"row": torch.tensor([[float(c)] for c in conditions]), "text": torch.ones(len(conditions), 2)}

    def encode_target(self, targets, condition):
        return torch.tensor(np.stack(targets), dtype=torch.float32)

    def unconditional(self, condition):
        return condition | {"text": torch.zeros_like(condition["text"])}

    def prior(self, condition):
        return self.start

    def velocity(self, x, sigma, condition):
        self.asked.append((x, sigma, condition, self.number.item(), self.training))
        return self.number.expand(x.shape)


def constant(rows=5, level=0.0, **settings):
    """Trains a Constant on targets level + row; gives it and what it logged."""
    net, logged = Constant(settings.pop("start", 0.0), settings.pop("prior", STANDARD)), []
    settings = {"steps": 20, "batch_size": 3, "lr": 0.1, "seed": 0} | settings
    targets = [np.full(4, level + row, np.float32) for row in range(rows)]
    assert imitate(net, range(rows), targets, on_log=lambda *line: logged.append(line), **settings) is net
    return net, logged


def losses(net, level=0.0):
    """The loss of each step from what the net was asked: the noise is read off x, sigma and the row's target."""
    found = []
    for x, sigma, condition, number, _ in net.asked:
        x0 = level + condition["row"].double()
        x1 = (x.double() - (1 - sigma.double()[:, None]) * x0) / sigma.double()[:, None]
        found.append(float((number - (x1 - x0)).square().mean()))
    return found


@pytest.mark.parametrize("prior", [STANDARD, Centred(3.0, 0.5)])
@pytest.mark.parametrize(
    ("steps", "ends"),
    [(20, range(1, 21)), (45, [*range(2, 45, 2), 45]), (70, [*range(3, 70, 3), 70]), (1, [1])],
)
def test_the_loss_is_that_of_the_velocity_and_logged_as_a_mean_since_the_last_line(steps, ends, prior):
    net, logged = constant(steps=steps, prior=prior)
    each = losses(net)
    assert [step for step, _ in logged] == list(ends)
    began = 0
    for step, metrics in logged:
        assert metrics["loss"] == pytest.approx(np.mean(each[began:step]), rel=1e-3)
        began = step


@pytest.mark.parametrize("prior", [STANDARD, Centred(3.0, 0.5)])
def test_the_mean_velocity_is_learned(prior):
    """The best constant is E[x1 - x0] = centre - 2, the targets being 0..4."""
    net, _ = constant(steps=600, batch_size=20, lr=0.05, prior=prior)
    assert net.number.item() == pytest.approx(prior.centre - 2, abs=0.15)


def test_paths_end_in_the_priors_noise():
    """Of v = 0 and x0 = 0, x / sigma is the noise: its moments are the prior's."""
    net, _ = constant(rows=1, steps=1, batch_size=5000, prior=Centred(3.0, 0.5))
    x, sigma, *_ = net.asked[0]
    noise = x / sigma[:, None]
    assert noise.mean().item() == pytest.approx(3, abs=0.03)
    assert noise.std().item() == pytest.approx(0.5, abs=0.02)


def test_the_rate_warms_up_and_falls_as_a_cosine_and_gradients_are_clipped():
    """Against targets that are far, some ten times further, the clipped gradient is always -1: Adam moves by the rate."""
    net = Constant()
    imitate(net, range(3), [np.full(4, -(10.0**row)) for row in (2, 3, 4)], steps=40, batch_size=1, lr=1e-2, seed=0)
    numbers = [number for *_, number, _ in net.asked] + [net.number.item()]
    warm = 2  # 5 % of 40
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * (step - warm) / 39)) for step in range(3, 41)]
    np.testing.assert_allclose(np.diff(numbers), 1e-2 * np.array(expected), atol=2e-6)


def test_one_step_is_taken_at_the_full_rate():
    net, _ = constant(steps=1, level=-1000.0, lr=1e-2)
    assert net.number.item() == pytest.approx(1e-2, rel=1e-4)


def test_no_steps_change_nothing():
    net, logged = constant(steps=0, start=0.7)
    assert net.number.item() == pytest.approx(0.7)
    assert not logged


def test_every_row_is_met_equally_often_and_in_another_order_each_time():
    net, _ = constant(rows=6, steps=9, batch_size=4)  # 36 of 6 rows
    seen = [row for batch in net.encoded for row in batch]
    epochs = [tuple(seen[first : first + 6]) for first in range(0, 36, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_batches_may_be_larger_than_the_data():
    net, _ = constant(rows=2, steps=3, batch_size=5)
    assert [len(batch) for batch in net.encoded] == [5, 5, 5]
    assert set(Counter(row for batch in net.encoded for row in batch).values()) <= {7, 8}


class Lazy(Sequence):
    """Rows that are made when read."""

    def __init__(self, make, count):
        self.make, self.count, self.read = make, count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.read += 1
        return self.make(row)


def test_rows_are_read_and_encoded_as_they_are_needed():
    conditions, targets = Lazy(float, 1000), Lazy(lambda row: np.full(4, row, np.float32), 1000)
    net = imitate(Constant(), conditions, targets, steps=2, batch_size=3, lr=0.1, seed=0)
    assert conditions.read == targets.read == 6
    assert [len(batch) for batch in net.encoded] == [3, 3]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_rows_goes_without_the_instruction(share):
    net, _ = constant(steps=200, batch_size=20, drop_text=share)
    texts = torch.cat([condition["text"] for *_, condition, _, _ in net.asked])
    rows = torch.cat([condition["row"] for *_, condition, _, _ in net.asked])
    assert bool((texts[:, 0] == texts[:, 1]).all())  # whole rows
    assert 1 - texts.mean().item() == pytest.approx(share, abs=0.03)
    assert rows.unique().numel() == 5  # the rest of the condition stays
    assert rows[texts[:, 0] == 0].unique().numel() == (5 if share else 0)


def test_sigmas_are_uniform_or_logit_normal():
    def asked(kind):
        net, _ = constant(steps=20, batch_size=1000, sigmas=kind)
        return torch.cat([sigma for _, sigma, *_ in net.asked]).double()

    uniform, logits = asked("uniform").sort().values, asked("logit_normal").logit()
    # Kolmogorov's distance of 20 000 draws passes 0.0115 once in a hundred.
    assert (uniform - torch.linspace(0, 1, 20_000, dtype=torch.float64)).abs().max() < 0.0115
    normal = 0.5 * (1 + torch.erf(logits.sort().values / math.sqrt(2)))
    assert (normal - torch.linspace(0, 1, 20_000, dtype=torch.float64)).abs().max() < 0.0115


def test_it_trains_in_training_mode_and_ends_in_evaluation_mode():
    net, _ = constant()
    assert all(training for *_, training in net.asked)
    assert not net.training


@pytest.mark.parametrize(("conditions", "targets"), [(3, 2), (2, 3), (0, 0)])
def test_lists_that_do_not_pair_are_refused(conditions, targets):
    message = f"{conditions} conditions and {targets} targets; both must be equal and not 0"
    with pytest.raises(ValueError, match=message):
        imitate(Constant(), range(conditions), [np.zeros(4)] * targets, steps=1, batch_size=1, lr=0.1, seed=0)


@pytest.mark.parametrize("level", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_it_before_the_weights_are_spoilt(level):
    net = Constant(0.5)
    targets = [np.full(4, level, np.float32)]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 1 of 7; lower warmup.lr=0.1"):
        imitate(net, [0], targets, steps=7, batch_size=2, lr=0.1, seed=0)
    assert net.number.item() == 0.5


# ---- on TinyFlow

WORDS = {"dark": 0.1, "light": 0.9}


def tiny():
    torch.manual_seed(0)
    return TinyFlow(channels=1, text=True, width=8, levels=1, words=2, buckets=64)


def paint(net, steps=120, seed=0, **settings):
    """Learns to make a grey picture dark or light as it is told; gives the net and its losses."""
    conditions = [{"image": np.full((8, 8, 1), 0.5, np.float32), "text": word} for word in WORDS]
    targets = [np.full((8, 8, 1), level, np.float32) for level in WORDS.values()]
    curve = []
    settings = {"batch_size": 16, "lr": 5e-3, "on_log": lambda _, line: curve.append(line["loss"])} | settings
    return imitate(net, conditions, targets, steps=steps, seed=seed, **settings), curve


def test_it_learns_what_each_text_asks_for():
    net, curve = paint(tiny())
    assert curve[-1] < curve[0] / 5
    given = net.encode([{"image": np.full((8, 8, 1), 0.5, np.float32), "text": word} for word in WORDS])
    x1 = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dark, light = net.decode(x1 - net.velocity(x1, torch.ones(2), given), given)  # one step from noise to data
    assert dark.mean() == pytest.approx(0.1, abs=0.1)
    assert light.mean() == pytest.approx(0.9, abs=0.1)


def same(net, other):
    return all(torch.equal(ours, others) for ours, others in zip(net.parameters(), other.parameters(), strict=True))


def test_it_depends_on_its_seed_alone():
    first, _ = paint(tiny(), steps=4)
    start = tiny()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, _ = paint(start, steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(again, first)
    other, _ = paint(tiny(), steps=4, seed=1)
    assert not same(other, first)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropping_the_text_trains_the_branch_without_it(share):
    """Only an empty text reads the feature of "no word", which thus stays as it is unless texts are dropped."""
    net, _ = paint(tiny(), steps=20, drop_text=share)
    moved = not torch.equal(net.reader.word.weight[0], tiny().reader.word.weight[0])
    assert moved == (share > 0)


def test_only_the_adapter_is_trained_if_there_is_one():
    net = tiny()
    nn.init.normal_(net.leave[-1].weight, std=0.3)  # at 0 no gradient passes it in the first step
    before = copy.deepcopy(net)
    adapter.add(net, Model(lora_rank=2))
    paint(net, steps=3)
    for name, weight in before.state_dict().items():
        stem, _, kind = name.rpartition(".")
        kept = net.state_dict().get(name, net.state_dict().get(f"{stem}.base_layer.{kind}"))
        assert torch.equal(kept, weight)
    assert all(weight.any() for name, weight in net.named_parameters() if "film.lora_B" in name)


# -- one step instead of several --------------------------------------------------------------------------------------------


def taught(steps=120, seed=0):
    """A net after flow matching on two possible targets, its one-step twin, and how far one step is from the ODE."""
    torch.manual_seed(1)
    net = TinyFlow(channels=1, text=False, width=8, levels=1)
    conditions = [{"image": np.full((8, 8, 1), 0.5, np.float32)}] * 2
    targets = [np.full((8, 8, 1), level, np.float32) for level in (0.1, 0.9)]
    imitate(net, conditions, targets, steps=150, batch_size=16, lr=5e-3, seed=0)
    twin = straighten(copy.deepcopy(net), conditions, steps=steps, batch_size=16, lr=5e-3, seed=seed)
    return net, twin


def drawn(net, steps):
    policy = FlowPolicy(net, FlowRollout(steps=4))
    return np.array(policy.generate([{"image": np.full((8, 8, 1), 0.5, np.float32)}] * 24, range(24), steps=steps))


def test_straightened_one_step_is_what_the_ode_drew_and_differs_with_the_noise():
    net, twin = taught()
    ode = drawn(net, 4)
    before, after = (np.abs(drawn(made, 1) - ode).mean() for made in (net, twin))
    assert after < 0.5 * before
    spread = [drawn(made, 1).mean((1, 2, 3)).std() for made in (net, twin)]
    assert spread[1] > 3 * spread[0], "in one step plain flow matching draws the mean from every noise"


def test_straightening_is_a_function_of_the_seed():
    one, two, other = (taught(steps=3, seed=seed)[1].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_straightening_without_rows_is_refused():
    with pytest.raises(ValueError, match="no conditions"):
        straighten(TinyFlow(channels=1, text=False, width=8, levels=1), [], steps=1, batch_size=1, lr=1e-3, seed=0)
