"""core/train/descent.py on a net of one weight, by closed form. What learns through it: test_flow_matching, test_forecasting."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from core.train.descent import descend


def path(steps, slope=1000.0, **settings):
    """The weight before each step and after the last one, and what was logged; the loss is slope * weight."""
    net, seen, logged = nn.Linear(1, 1), [], []
    nn.init.zeros_(net.weight)

    def loss(step):
        seen.append((step, net.weight.item()))
        return slope * net.weight.sum()

    descend(net, loss, steps=steps, **{"lr": 1e-2, "on_log": lambda *line: logged.append(line)} | settings)
    assert [step for step, _ in seen] == [*range(1, steps + 1)]
    return [weight for _, weight in seen] + [net.weight.item()], logged


@pytest.mark.parametrize(("steps", "warm_up", "rise"), [(40, True, 2), (100, True, 5), (10, True, 1), (40, False, 1)])
def test_the_rate_rises_for_a_twentieth_and_falls_as_a_cosine_to_zero(steps, warm_up, rise):
    """Adam moves by the rate against a gradient that is always the same."""
    weights, _ = path(steps, warm_up=warm_up)
    expected = [step / rise for step in range(1, rise)]
    expected += [0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise + 1))) for step in range(rise, steps + 1)]
    np.testing.assert_allclose(-np.diff(weights), 1e-2 * np.array(expected), atol=2e-6)


def test_what_is_logged_is_the_mean_loss_since_the_last_line_and_of_the_rest_at_the_end():
    weights, logged = path(45)
    assert [step for step, _ in logged] == [*range(2, 45, 2), 45]
    began = 0
    for step, metrics in logged:
        assert metrics == {"loss": pytest.approx(1000 * np.mean(weights[began:step]))}
        began = step
    assert path(45, on_log=None)[0] == weights


def test_gradients_are_clipped_to_norm_one_together():
    net, clipped = nn.Linear(2, 1, bias=False), []

    def loss(step):
        clipped.append(net.weight.grad)
        return (net.weight @ torch.tensor([300.0, 400.0])).sum()

    descend(net, loss, steps=2, lr=1e-2)
    torch.testing.assert_close(clipped[1], torch.tensor([[0.6, 0.8]]))


def test_weights_that_need_no_gradient_stay_and_the_first_loss_that_is_not_finite_ends_it():
    net = nn.Linear(1, 1)
    net.bias.requires_grad_(False)
    before = net.bias.item()
    descend(net, lambda step: net(torch.ones(1)).sum(), steps=3, lr=0.1)
    assert net.bias.item() == before
    asked = []

    def loss(step):
        asked.append(step)
        return net.weight.sum() * (math.nan if step == 2 else 1.0)

    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 2 of 7; lower warmup.lr=0.1"):
        descend(net, loss, steps=7, lr=0.1)
    assert asked == [1, 2]
