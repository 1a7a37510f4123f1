"""ForecastPolicy: what a rollout draws, that `forward` weighs it alike, what is fed back, references, and completions."""

import copy

import numpy as np
import pytest
import torch
from torch import distributions as known

from core.app import Quantity, Shape
from core.config import ConfigError, ForecastRollout, Model
from core.policy.forecast import ForecastPolicy, completion_dtype
from core.policy.step_nets import ConvLSTM, UNet, ViT

QUANTITY = Quantity(("a", "b"), ((15.0, 35.0, 75.0), (30.0, 80.0, 150.0)))
H, V, Y, X, LEADS = 2, 2, 4, 6, 5
NETS = {"unet": lambda *io: UNet(*io, width=8, levels=1), "lstm": lambda *io: ConvLSTM(*io, width=8),
        "vit": lambda *io: ViT(*io, width=16, layers=1, heads=2, patch=2)}  # fmt: skip


def condition(seed, maps=True):
    chance = np.random.default_rng(seed)
    made = {
        "history": chance.gamma(2, 15, (H, V, Y, X)),
        "seen": chance.random((H, V, Y, X)) < 0.4,
        "given": chance.normal(size=(3, Y, X)),
        "ahead": chance.normal(size=(LEADS, 2)),
        "maps_ahead": chance.normal(size=(LEADS, 1, Y, X)),
        "valid": chance.random((LEADS, V, Y, X)) < 0.4,
    }
    made = {name: part.astype(np.float32) for name, part in made.items()}
    return made if maps else {name: part for name, part in made.items() if name != "maps_ahead"}


GIVEN = [condition(seed) for seed in range(3)]
SEEDS = [11, 12, 13]


def policy(net="unet", half=False, stir=0.3, **settings):
    settings = ForecastRollout(**{"leads": 3, "bins": 8, "rank": 2} | settings)
    shape = ForecastPolicy.shape(GIVEN[0], settings, QUANTITY)
    torch.manual_seed(0)
    made = NETS[net](shape.inputs, shape.outputs)
    with torch.no_grad():
        made.leave.weight.normal_(0, stir)
    return ForecastPolicy(made, settings, QUANTITY, half=half)


def rand_like(tensor, by=0.3):
    return by * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))


def moved(acting, by=0.05):
    """The same policy a little later."""
    later = copy.deepcopy(acting)
    with torch.no_grad():
        for p in later.net.parameters():
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return later


def counted(acting, net=None):
    """Rows of every call of the net from now on."""
    net, seen = net or acting.net, []
    step = net.step
    net.step = lambda x, memory=None: seen.append(len(x)) or step(x, memory)
    return seen


# -- what the net sees ----------------------------------------------------------------------------------------------------


def test_the_shape_of_a_net_is_that_of_its_conditions():
    settings = ForecastRollout(bins=8, rank=2)
    assert ForecastPolicy.shape(GIVEN[0], settings, QUANTITY) == Shape(2 * H * V + 3 + 2 + 1, 20, Y, X)
    assert ForecastPolicy.shape(condition(0, maps=False), settings, QUANTITY).inputs == 2 * H * V + 3 + 2
    for distribution, outputs in (("gaussian", 2), ("low_rank", 6)):
        assert (
            ForecastPolicy.shape(GIVEN[0], ForecastRollout(distribution=distribution, rank=2), QUANTITY).outputs
            == outputs
        )


def test_channels_are_frames_seen_given_and_what_is_known_of_the_valid_time():
    acting = policy()
    c = GIVEN[0]
    seen = acting.view(acting.encode(GIVEN), 2)[0].numpy()
    np.testing.assert_allclose(seen[:4], np.log1p(c["history"] / 10).reshape(4, Y, X), rtol=1e-5)
    np.testing.assert_array_equal(seen[4:8], c["seen"].reshape(4, Y, X))
    np.testing.assert_array_equal(seen[8:11], c["given"])
    np.testing.assert_array_equal(seen[11:13], np.broadcast_to(c["ahead"][2][:, None, None], (2, Y, X)))
    np.testing.assert_array_equal(seen[13:], c["maps_ahead"][2])


def test_a_frame_that_is_fed_back_was_not_seen():
    acting = policy()
    given = acting.encode(GIVEN)
    frame = torch.rand(3, V, Y, X, requires_grad=True)
    later = acting.advance(given, frame)
    assert torch.equal(later["frames"], torch.stack([given["frames"][:, 1], frame.detach()], dim=1))
    assert torch.equal(later["seen"][:, 0], given["seen"][:, 1])
    assert not later["seen"][:, 1].any()
    assert not later["frames"].requires_grad


@pytest.mark.parametrize("name", ["history", "seen", "given", "ahead", "maps_ahead"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_never_reaches_the_net(name, value):
    bad = condition(1)
    bad[name].flat[5] = value
    acting = policy()
    for act in (
        lambda: acting.rollout([GIVEN[0], bad], 2, [1, 2]),
        lambda: acting.forecast([GIVEN[0], bad], 2),
        lambda: acting.sample_forecasts([GIVEN[0], bad], [1, 2], 2),
    ):
        with pytest.raises(ValueError, match=f"1 numbers in '{name}' of 2 conditions are not finite"):
            act()


def test_a_forecast_beyond_what_is_known_is_refused():
    for act in (
        lambda: policy(leads=6).rollout(GIVEN, 2, SEEDS),
        lambda: policy().forecast(GIVEN, 6),
        lambda: policy().sample_forecasts(GIVEN, SEEDS, 6),
    ):
        with pytest.raises(ValueError, match="6 leads are more than the 5 that the conditions know of"):
            act()


def test_a_net_of_another_distribution_is_refused_in_words():
    other = ForecastPolicy(policy(bins=8).net, ForecastRollout(bins=9), QUANTITY)
    with pytest.raises(ConfigError, match=r"the net gives 20 channels and rollout.distribution=categorical reads 22"):
        other.forecast(GIVEN, 1)


# -- rollouts -------------------------------------------------------------------------------------------------------------

SETTINGS = {name: {"distribution": name} for name in ("categorical", "gaussian", "low_rank")}
SETTINGS["head"] = {"distribution": "gaussian", "decide": "head"}
KINDS = pytest.mark.parametrize("kind", SETTINGS)
FED = pytest.mark.parametrize("feedback", ["mean", "sample"])


def fed_policy(kind, feedback, net="unet"):
    if kind == "head" and feedback == "sample":
        pytest.skip("a class is no value to go on from")
    return policy(net, feedback=feedback, **SETTINGS[kind])


@KINDS
@FED
def test_a_rollout_does_not_depend_on_batches_or_on_other_prompts(kind, feedback):
    acting = fed_policy(kind, feedback)
    whole = acting.rollout(GIVEN, 4, SEEDS)
    for size in (1, 2, 5):
        split = acting.rollout(GIVEN, 4, SEEDS, batch_size=size)
        torch.testing.assert_close(split.logps, whole.logps, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(split.outputs, whole.outputs, rtol=1e-4, atol=1e-3)
        assert split.state.keys() == whole.state.keys()
        for name, part in whole.state.items():
            torch.testing.assert_close(split.state[name], part, atol=1e-5, rtol=1e-5)
    alone = acting.rollout(GIVEN[1:2], 4, [12])
    np.testing.assert_allclose(alone.outputs, whole.outputs[4:8], rtol=1e-4)
    assert not np.allclose(acting.rollout(GIVEN[1:2], 4, [13]).outputs, alone.outputs)


def test_no_pass_of_a_rollout_has_more_rows_than_asked_for():
    for feedback, passes in (("mean", [2, 2, 2, 1, 1, 1]), ("sample", [2] * 18)):
        acting = policy(feedback=feedback)
        seen = counted(acting)
        acting.rollout(GIVEN, 4, SEEDS, batch_size=2)
        assert seen == passes, "three leads of every part; fed back the mean, a condition is one row"


@KINDS
def test_a_group_is_as_many_separate_runs_of_its_condition(kind):
    """Slow and separate: each rollout with a net pass of its own, its own noise, its own frames."""
    acting = policy(**SETTINGS[kind])
    made, size = acting.rollout(GIVEN[:1], 4, [7]), V * Y * X
    generator = torch.Generator().manual_seed(7)
    noise = [acting.family.noise(4, (V, Y, X), generator) for _ in range(3)]
    for g in range(4):
        given, logps = acting.encode(GIVEN[:1]), []
        valid = torch.from_numpy(GIVEN[0]["valid"])
        for lead in range(3):
            with torch.no_grad():
                frames, _ = acting.distribution(given, lead, None, valid[None, lead])
            action = frames.sample(noise[lead][g : g + 1])
            logps.append(frames.log_prob(action).flatten())
            np.testing.assert_allclose(acting.family.values(action)[0], made.outputs[g][lead], rtol=1e-4)
            given = acting.advance(given, frames.state())
        torch.testing.assert_close(torch.cat(logps), made.logps[g], atol=1e-5, rtol=1e-5)
    assert made.unit == size
    assert made.logps.shape == (4, 3 * size)


@pytest.mark.parametrize("net", NETS)
def test_evaluations_and_starts_take_the_path_of_rollouts(net):
    acting = policy(net)
    made = acting.rollout(GIVEN, 2, SEEDS)
    with torch.no_grad():
        path = torch.stack([frames.state() for frames in acting.unroll(acting.encode(GIVEN), 3)], dim=1)
    torch.testing.assert_close(made.state["frames"][::2, H:], path[:, :2], atol=1e-5, rtol=1e-5)


def test_fed_back_the_sample_every_rollout_goes_its_own_way():
    acting = policy(feedback="sample")
    made = acting.rollout(GIVEN[:1], 4, [7])
    frames = made.state["frames"]
    assert not torch.allclose(frames[0, H], frames[1, H])
    values = torch.from_numpy(np.stack(made.outputs))[:, :2]
    torch.testing.assert_close(frames[:, H:], acting.family.scale.inward(values), atol=1e-5, rtol=1e-5)
    assert len(made.state["condition"].unique()) == 4
    same = policy(feedback="mean").rollout(GIVEN[:1], 4, [7]).state
    assert torch.equal(same["frames"][0], same["frames"][3])
    assert len(same["condition"].unique()) == 1


def test_decisions_are_in_c_order_and_the_mask_is_what_was_observed():
    made = policy().rollout(GIVEN, 2, SEEDS)
    expected = np.stack([c["valid"][:3].ravel() for c in GIVEN]).repeat(2, 0)
    np.testing.assert_array_equal(made.mask, expected)
    frames = policy()
    lead, v, y, x = 2, 1, 3, 4
    t = ((lead * V + v) * Y + y) * X + x
    action = made.state["actions"][3]
    later = moved(frames)
    action_changed = copy.deepcopy(made)
    action_changed.state["actions"][3, lead, v, y, x] = (action[lead, v, y, x] + 1) % 8
    differs = (later(made).logps != later(action_changed).logps).nonzero().tolist()
    assert differs == [[3, t]]


def test_what_is_valid_is_no_input():
    other = [c | {"valid": 1 - c["valid"]} for c in GIVEN]
    acting = policy()
    np.testing.assert_array_equal(acting.rollout(GIVEN, 2, SEEDS).outputs, acting.rollout(other, 2, SEEDS).outputs)


def test_a_block_is_a_lead_or_what_the_condition_says():
    made = policy().rollout(GIVEN, 2, SEEDS)
    assert made.segments.tolist() == [[lead for lead in range(3) for _ in range(V * Y * X)]] * 6
    blocks = np.arange(LEADS * V * Y * X).reshape(LEADS, V, Y, X) // 5
    made = policy().rollout([c | {"segments": blocks} for c in GIVEN], 2, SEEDS)
    assert made.segments.tolist() == [blocks[:3].ravel().tolist()] * 6


@pytest.mark.parametrize(
    ("settings", "leads"),
    [({"leads": 12, "first_leads": 3, "leads_every": 1}, {0: 3, 1: 4, 2: 5, 20: 12}),  # arXiv 2511.22169, published
     ({"leads": 4, "first_leads": 2, "leads_every": 10}, {0: 2, 9: 2, 10: 3, 29: 4, 500: 4}),
     ({"leads": 3, "first_leads": 1, "leads_every": 0}, {0: 3, 50: 3})],
)  # fmt: skip
def test_rollouts_grow_along_the_curriculum(settings, leads):
    acting = policy(**settings)
    assert {batch: acting.leads(batch) for batch in leads} == leads
    assert acting.units == settings["leads"]


def test_a_longer_rollout_begins_as_a_shorter_one():
    acting = policy(leads=4, first_leads=2, leads_every=1)
    short, long = (acting.rollout(GIVEN, 2, SEEDS, batch=batch) for batch in (0, 2))
    assert short.outputs[0].shape == (2, V, Y, X)
    np.testing.assert_allclose([one[:2] for one in long.outputs], short.outputs, rtol=1e-5)


# -- weighing again -------------------------------------------------------------------------------------------------------


@KINDS
@FED
@pytest.mark.parametrize("net", NETS)
def test_the_policy_that_acted_weighs_its_acts_alike(net, kind, feedback):
    acting = fed_policy(kind, feedback, net)
    made = acting.rollout(GIVEN, 4, SEEDS)
    ratio = (acting(made).logps - made.logps).exp()
    assert float((ratio.detach() - 1).abs().max()) < 1e-5
    later, unit = moved(acting), made.unit
    whole = later(made)
    assert float((whole.logps - made.logps).detach().abs().max()) > 0.01
    for part in (slice(0, unit), slice(unit, 3 * unit), slice(2 * unit, None), slice(7, 2 * unit + 3)):
        again = later(made, part)
        torch.testing.assert_close(again.logps, whole.logps[:, part], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.entropy, whole.entropy[:, part], atol=1e-5, rtol=1e-5)
    for rows in (slice(0, 4), slice(3, 9), slice(5, 6), slice(2, 12)):
        torch.testing.assert_close(later(made.rows(rows)).logps, whole.logps[rows], atol=1e-5, rtol=1e-5)


@FED
def test_a_condition_takes_one_row_of_the_net_however_many_rollouts_it_has(feedback):
    acting = policy(feedback=feedback)
    made = acting.rollout(GIVEN, 4, SEEDS)
    seen = counted(acting)
    acting(made)
    acting(made.rows(slice(3, 9)), slice(0, made.unit))
    assert seen == ([3 * 3, 3] if feedback == "mean" else [12 * 3, 6])


def test_a_recurrent_net_begins_again_at_the_first_lead():
    acting = policy("lstm")
    made = acting.rollout(GIVEN, 4, SEEDS)
    seen = counted(acting)
    acting(made, slice(made.unit, 2 * made.unit))
    assert seen == [3, 3]


@pytest.mark.parametrize("net", ["unet", "lstm"])
def test_the_gradient_is_that_of_the_frames_that_were_fed_back_then(net):
    """Against finite differences of an old trajectory: none flows through time, but all through a memory."""
    acting = policy(net, distribution="gaussian")
    made = acting.rollout(GIVEN[:1], 2, [3])
    acting.double()
    made.state = {n: part.double() if part.is_floating_point() else part for n, part in made.state.items()}
    made.mask = made.mask.double()
    acting.step = lambda net, x, memory=None: net.step(x, memory)  # without the cast to float32
    weight = acting.net.enter.weight
    last = slice(2 * made.unit, None)
    acting(made, last).logps.sum().backward()
    for at in ((0, 0, 1, 1), (3, 2, 0, 2)):
        with torch.no_grad():
            sides = []
            for step in (1e-5, -2e-5):
                weight[at] += step
                sides.append(float(acting(made, last).logps.sum()))
            weight[at] += 1e-5
        assert float(weight.grad[at]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-6)


def test_entropy_and_divergence_are_those_of_each_decision():
    acting = policy()
    acting.keep_reference()
    made = acting.rollout(GIVEN, 4, SEEDS)
    assert float(acting(made).extras["divergence"].detach().abs().max()) < 1e-6
    later = moved(acting)
    decisions = later(made)
    for lead in range(3):
        logits = []
        for net in (later.net, later._reference[0]):
            frames = made.state["frames"][::4, lead : lead + H]
            seen = torch.cat([made.state["seen"][::4], torch.zeros(3, LEADS, V, Y, X)], dim=1)[:, lead : lead + H]
            given = later.encode(GIVEN) | {"frames": frames, "seen": seen}
            with torch.no_grad():
                output = net.step(later.view(given, lead))[0]
            logits.append(later.family(output, frames[:, -1]).logps.movedim(2, -1))
        ours, theirs = (known.Categorical(logits=one) for one in logits)
        at = slice(lead * made.unit, (lead + 1) * made.unit)
        of_rows = known.kl_divergence(ours, theirs).flatten(1).repeat_interleave(4, 0)
        torch.testing.assert_close(decisions.extras["divergence"][:, at], of_rows, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(decisions.entropy[:, at], ours.entropy().flatten(1).repeat_interleave(4, 0))
    assert decisions.extras["divergence"].requires_grad
    assert not any("reference" in name for name in later.state_dict())
    assert len(list(later.parameters())) == len(list(later.net.parameters())), "the copy is not trained"


@pytest.mark.parametrize("net", NETS)
def test_an_adapter_that_is_turned_off_is_the_reference(net):
    acting = policy(net)
    acting.net.add_lora(Model(lora_rank=2))
    acting.keep_reference()
    assert not acting._reference
    made = acting.rollout(GIVEN, 2, SEEDS)
    with torch.no_grad():
        for p in acting.trained().values():
            p.normal_(0, 0.1)
    decisions = acting(made)
    assert float(decisions.extras["divergence"].detach().max()) > 0.01
    decisions.logps.sum().backward()
    assert all(p.grad is not None for p in acting.trained().values())
    with acting.reference():
        np.testing.assert_allclose(acting.rollout(GIVEN, 2, SEEDS).outputs, made.outputs, rtol=1e-5)


def test_no_reference_no_divergence():
    acting = policy()
    assert not acting(acting.rollout(GIVEN, 2, SEEDS)).extras


def test_half_precision_weighs_as_it_acts():
    acting = policy(half=True)
    made = acting.rollout(GIVEN, 4, SEEDS)
    assert made.logps.dtype == torch.float32
    torch.testing.assert_close(acting(made).logps, made.logps, atol=0.1, rtol=0.05)
    whole = policy().rollout(GIVEN, 4, SEEDS)
    assert not torch.equal(whole.logps, made.logps)


# -- completions ----------------------------------------------------------------------------------------------------------


@KINDS
def test_a_forecast_is_a_structured_completion(kind):
    acting = policy(**SETTINGS[kind])
    made = acting.forecast(GIVEN, LEADS)
    assert len(made) == 3
    assert made[0].shape == (LEADS, V, Y, X)
    assert made[0].dtype == completion_dtype(3) == np.dtype(
        [("value", "f4"), ("level", "i1"), ("exceed", "f2", (3,)), ("members", "f2", (8,))]
    )  # fmt: skip
    assert (np.diff(made[0]["members"].astype(float)) >= 0).all()
    assert (np.diff(made[0]["exceed"].astype(float)) <= 0).all()
    for size in (1, 2):
        again = acting.forecast(GIVEN, LEADS, size)
        for name in ("value", "exceed", "members"):
            np.testing.assert_allclose(
                [a[name].astype(float) for a in again], [m[name].astype(float) for m in made], rtol=2e-3, atol=1e-3
            )


@KINDS
def test_fields_of_a_completion_are_those_of_the_distribution(kind):
    acting = policy(**SETTINGS[kind])
    made = acting.forecast(GIVEN, 2)
    given = acting.encode(GIVEN)
    with torch.no_grad():
        for lead in range(2):
            frames, _ = acting.distribution(given, lead)
            np.testing.assert_allclose([m["value"][lead] for m in made], frames.mean(), rtol=1e-4)
            p = frames.exceedance(QUANTITY.edges).movedim(2, -1)
            np.testing.assert_allclose([m["exceed"][lead] for m in made], p, atol=1e-3)
            sides = np.concatenate([np.ones((3, V, Y, X, 1)), p.numpy(), np.zeros((3, V, Y, X, 1))], axis=-1)
            levels = frames.announced() if kind == "head" else (-np.diff(sides)).argmax(-1)
            np.testing.assert_array_equal([m["level"][lead] for m in made], levels)
            middle = frames.quantiles([7 / 16, 9 / 16])
            np.testing.assert_allclose([m["members"][lead, ..., 3] for m in made], middle[:, 0], rtol=2e-3, atol=1e-3)
            given = acting.advance(given, frames.state())


def test_what_is_announced_is_the_likeliest_class_or_that_of_the_mean():
    by_class, by_mean = (policy(decide=decide).forecast(GIVEN, 2) for decide in ("class", "mean"))
    for one, other in zip(by_class, by_mean, strict=True):
        np.testing.assert_array_equal(one["value"], other["value"])
        for v, edges in enumerate(QUANTITY.edges):
            np.testing.assert_array_equal(other["level"][:, v], np.digitize(other["value"][:, v], edges))
    assert (np.stack(by_class)["level"] != np.stack(by_mean)["level"]).any()


def test_a_head_announces_what_its_forecast_would_until_it_learns():
    plain, headed = (policy(distribution="gaussian", decide=decide, stir=0.0) for decide in ("class", "head"))
    with torch.no_grad():
        for net in (plain.net, headed.net):
            net.leave.weight[:V].copy_(rand_like(net.leave.weight[:V]))
    for one, other in zip(plain.forecast(GIVEN, LEADS), headed.forecast(GIVEN, LEADS), strict=True):
        np.testing.assert_array_equal(one, other)
    with torch.no_grad():  # the head alone: the second class whatever is forecast
        headed.net.leave.bias[V:].copy_(torch.tensor([0.0, 50, 0, 0] * V))
    for one, other in zip(plain.forecast(GIVEN, LEADS), headed.forecast(GIVEN, LEADS), strict=True):
        assert (other["level"] == 1).all()
        for name in ("value", "exceed", "members"):
            np.testing.assert_array_equal(one[name], other[name])


def test_a_class_is_no_value_to_go_on_from():
    with pytest.raises(ConfigError, match=r"decide=head draws classes, .*use feedback=mean or decide=class"):
        policy(decide="head", feedback="sample")


def test_a_forecast_goes_on_from_its_mean_whatever_rollouts_feed_back():
    for act in (lambda p: p.forecast(GIVEN, 4), lambda p: p.sample_forecasts(GIVEN, SEEDS, 4)):
        one, other = (act(policy(feedback=feedback)) for feedback in ("mean", "sample"))
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_untrained_policy_forecasts_the_last_frame():
    for net in NETS:
        made = policy(net, stir=0.0, distribution="gaussian", sigma=1e-3).forecast(GIVEN, LEADS)
        for c, fields in zip(GIVEN, made, strict=True):
            np.testing.assert_allclose(fields["value"], np.broadcast_to(c["history"][-1], (LEADS, V, Y, X)), rtol=1e-4)


def test_samples_are_as_frequent_as_the_forecast_says():
    acting = policy()
    drawn = np.stack(acting.sample_forecasts(GIVEN[:1] * 2000, range(2000), 2))
    assert drawn.shape == (2000, 2, V, Y, X)
    assert drawn.dtype == np.float32
    said = acting.forecast(GIVEN[:1], 2)[0]["exceed"]
    for v, edges in enumerate(QUANTITY.edges):
        for e, edge in enumerate(edges):
            np.testing.assert_allclose((drawn[:, :, v] >= edge).mean(0), said[:, v, ..., e], atol=0.05)
    again = acting.sample_forecasts(GIVEN[:1], [5], 2)[0]
    np.testing.assert_allclose(again, drawn[5], rtol=1e-5)


def test_averaged_weights_are_what_forecasts_and_is_saved(tmp_path):
    acting = policy()
    acting.average(0.5)
    start, plain = copy.deepcopy(acting.net.state_dict()), acting.forecast(GIVEN, 2)
    with torch.no_grad():
        for p in acting.net.parameters():
            p.add_(0.3)
    np.testing.assert_array_equal(acting.forecast(GIVEN, 2), plain)
    acting.save(tmp_path)
    acting.net.restore(tmp_path)
    assert all(torch.equal(p, start[name]) for name, p in acting.net.state_dict().items())


# -- learning -------------------------------------------------------------------------------------------------------------


@KINDS
def test_asymmetric_costs_move_the_announced_class(kind):
    """REINFORCE with a group mean. Half the truths are "good", half "moderate", and nothing tells which.

    Then the cheaper mistake is the one to make: 1 where misses cost ten times false alarms, 0 where it is the other way.
    """
    edge = np.array([15.0, 30.0], np.float32)[:, None, None]
    given = [c | {"history": np.broadcast_to(0.98 * edge, (H, V, Y, X))} for c in GIVEN]
    announced = {}
    for miss, false_alarm in ((1.0, 0.1), (0.1, 1.0)):
        acting, chance = policy(**SETTINGS[kind], stir=0.0, leads=1), np.random.default_rng(0)
        untrained = acting.forecast(given, 1)
        optimizer = torch.optim.Adam(acting.net.parameters(), lr=0.01)
        for step in range(25):
            made = acting.rollout(given, 8, [seed + 100 * step for seed in SEEDS])
            alarm = (np.stack(made.outputs) >= edge).reshape(3, 8, -1)
            event = chance.random((3, 1, alarm.shape[-1])) < 0.5
            reward = -torch.from_numpy(miss * (event & ~alarm) + false_alarm * (alarm & ~event)).float()
            advantage = (reward - reward.mean(1, keepdim=True)).flatten(0, 1)
            optimizer.zero_grad()
            (-(advantage * acting(made).logps).mean()).backward()
            optimizer.step()
        announced[miss] = np.mean([fields["level"] >= 1 for fields in acting.forecast(given, 1)])
        if kind == "head":
            for fields, before in zip(acting.forecast(given, 1), untrained, strict=True):
                np.testing.assert_array_equal(fields["value"], before["value"], "costs move the decision alone")
    assert announced[1.0] > 0.95
    assert announced[0.1] < 0.05
