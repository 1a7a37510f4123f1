"""What a net's output says of the next frame of a forecast: V variables on Y x X cells, of which every one is a decision.

A family (`Categorical`, `Gaussian`, `LowRankGaussian`, and `Decided`, a head of its own for the class beside one of them) knows
classes and scales; called with the output (N, O, Y, X) of a net and the last frame, it gives the distribution of the next one.
Nets and distributions live in s = log(1 + x / scale), in which a value of 5 and one of 500 are read with like care; a completion
and a class are about the value x, in [0, top].

An *action* is what is drawn: the number of a bin, or an s. Its value is a function of it (`values`). An output of 0 means "as
the last frame", so that a net whose last layer starts at 0 is persistence: the Gaussians add the last frame to their mean, the
categorical takes one logit from a bin for every mean bin width that it lies away from it.

All sums and logarithms are float32 (or the output's own, if wider). Densities, divergences and entropies are standard; the
rules of bins, of smooth factors and of shares are ours. Not covered: spreads that depend on the cell, mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.config import ConfigError

if TYPE_CHECKING:
    from core.app import Quantity
    from core.config import ForecastRollout

LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)


class Distribution(Protocol):
    """Of N frames. Values and probabilities are (N, V, Y, X) unless said otherwise; G draws of each may stand before N."""

    def sample(self, noise: Tensor) -> Tensor:
        """The actions that `Family.noise` makes: noise ([G,] N, ...) -> ([G,] N, V, Y, X)."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Nats, ([G,] N, V, Y, X): of each cell's action, or shares that sum to that of the whole frame."""

    def kl(self, other: Distribution) -> Tensor:
        """KL(self || other) of the same family, nats; shared like log_prob."""

    def entropy(self) -> Tensor:
        """Nats; of an s, not of a value, where that is continuous."""

    def error(self, values: Tensor) -> Tensor:
        """What a supervised start lessens, given the true values."""

    def state(self) -> Tensor:
        """The mean of s, in [0, s(top)]: what is fed back."""

    def mean(self) -> Tensor:
        """Of the value."""

    def mode(self) -> Tensor:
        """The value of the likeliest action."""

    def exceedance(self, edges: Sequence[Sequence[float]]) -> Tensor:
        """P(value >= edge) of the edges of each variable, (N, V, E, Y, X)."""

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """Values that are not exceeded with these probabilities, (N, Q, V, Y, X)."""


class Scale:
    """s = log(1 + x / scale) of values x in [0, top]; scale = inf: s = x."""

    def __init__(self, scale: float, top: float):
        self.scale, self.top = scale, top
        self.end = float(self.inward(torch.tensor(top, dtype=torch.float64)))  # the greatest s

    def inward(self, x: Tensor) -> Tensor:
        """Values outside of [0, top] are read as the nearest one inside."""
        x = x.clamp(0, self.top)
        return x if math.isinf(self.scale) else (x / self.scale).log1p()

    def outward(self, s: Tensor) -> Tensor:
        s = s.clamp(0, self.end)
        return (s if math.isinf(self.scale) else self.scale * s.expm1()).clamp(0, self.top)

    def normal_mean(self, mean: Tensor, std: Tensor) -> Tensor:
        """E[outward(s)] of s ~ N(mean, std^2), in closed form."""
        low, high = (-mean) / std, (self.end - mean) / std
        inside, beyond = torch.special.ndtr(high) - torch.special.ndtr(low), torch.special.ndtr(-high)
        if math.isinf(self.scale):
            density = (-low.square() / 2).exp() - (-high.square() / 2).exp()
            part = mean * inside + std * density / math.sqrt(2 * math.pi)
        else:  # a lognormal is the same integral one variance further up
            grown = (mean + std.square() / 2).clamp(max=80.0).exp()  # beyond 80 nothing is inside
            part = self.scale * (grown * (torch.special.ndtr(high - std) - torch.special.ndtr(low - std)) - inside)
        return part.clamp(min=0) + self.top * beyond


def edges_of_bins(edges: Sequence[float], scale: Scale, bins: int) -> np.ndarray:
    """The bins + 1 edges, in values, of one variable's bins: 0, every class edge, top, and others between them.

    Each class begins as one bin in s; then, until there are `bins`, the class with the widest bins (of equals the lowest) is
    divided evenly, in s, into one more. Thus every class edge is a bin's, and the widest bin is as narrow as it can be.
    Raises ConfigError if there are more classes than bins.
    """
    if bins < len(edges) + 1:
        raise ConfigError(
            f"rollout.bins={bins} is fewer than the {len(edges) + 1} classes, each of which needs one: use at least that"
        )
    bounds = torch.tensor([0.0, *edges, scale.top], dtype=torch.float64)
    widths = np.diff(scale.inward(bounds).numpy())
    parts = np.ones(len(widths), dtype=int)
    while parts.sum() < bins:
        parts[np.argmax(widths / parts)] += 1
    inside = []
    for (low, high), count in zip(pairwise(bounds), parts, strict=True):
        between = torch.linspace(0, 1, int(count) + 1, dtype=torch.float64)[:-1]
        s = torch.lerp(scale.inward(low), scale.inward(high), between)
        inside += [float(low), *scale.outward(s[1:]).tolist()]  # the class edge itself, not what rounding makes of it
    return np.array([*inside, scale.top])


SPREADS = 3.0  # most that a categorical widens or narrows, as a logarithm


class Categorical(nn.Module):
    """Which of `bins` bins the value lies in. A bin's value is the middle of it in s; it is bounded by construction.

        log p_k = free_k - |middle_k - (last + shift)| / (width exp(spread)) + constant,    width = of a bin in s, on average

    The net gives shift, spread and the free parts. Shift and spread move all bins at once, as a regression does, and so are
    learned in few steps; the free parts give any other shape. All at 0 it is the last frame, with some doubt.

    edges: class edges of each variable, of which every one is an edge of bins (`edges_of_bins`).
    """

    def __init__(self, edges: Sequence[Sequence[float]], scale: Scale, bins: int):
        super().__init__()
        self.scale, self.bins, self.outputs = scale, bins, len(edges) * (2 + bins)
        of_values = torch.tensor(np.stack([edges_of_bins(one, scale, bins) for one in edges]))
        of_s = scale.inward(of_values)
        middle = (of_s[:, 1:] + of_s[:, :-1]) / 2
        tables = {"bounds": of_values, "ends": of_s, "middle": middle, "middle_value": scale.outward(middle)}
        for name, table in tables.items():  # (V, K) or (V, K + 1)
            self.register_buffer(name, table.float(), persistent=False)

    def forward(self, output: Tensor, last: Tensor, valid: Tensor | None = None) -> CategoricalFrames:
        """output (N, V * (2 + bins), Y, X), last (N, V, Y, X) in s."""
        shift, spread, free = output.unflatten(1, (-1, 2 + self.bins)).split([1, 1, self.bins], dim=2)
        away = (self.middle[:, :, None, None] - last.unsqueeze(2) - shift).abs()
        logits = free - away * (self.bins / self.scale.end) * (-spread.clamp(-SPREADS, SPREADS)).exp()
        return CategoricalFrames(logits.log_softmax(dim=2), self)

    def noise(self, count: int, cells: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Uniform, (count, V, Y, X)."""
        return torch.rand(count, *cells, generator=generator)

    def actions(self, values: Tensor) -> Tensor:
        """(..., V, Y, X) -> the bins that hold these values, int16."""
        by_variable = values.movedim(-3, 0).contiguous()
        found = [torch.bucketize(x, inner[1:-1], right=True) for x, inner in zip(by_variable, self.bounds, strict=True)]
        return torch.stack(found, dim=-3).to(torch.int16)

    def values(self, actions: Tensor) -> Tensor:
        return self._looked_up(self.middle_value, actions)

    def states(self, actions: Tensor) -> Tensor:
        return self._looked_up(self.middle, actions)

    def _looked_up(self, table: Tensor, actions: Tensor) -> Tensor:
        found = [row[bins.long()] for row, bins in zip(table, actions.unbind(-3), strict=True)]
        return torch.stack(found, dim=-3)


class CategoricalFrames:
    """logps: (N, V, K, Y, X), normalised over K."""

    def __init__(self, logps: Tensor, family: Categorical):
        self.logps, self.family = logps, family
        self._probs = None

    @property
    def probs(self) -> Tensor:
        if self._probs is None:
            self._probs = self.logps.exp()
        return self._probs

    def sample(self, noise: Tensor) -> Tensor:
        """By the inverse of the cumulated probabilities, so that a decision takes one number of chance."""
        below, bins = 0.0, 0
        for p in self.probs.unbind(2)[:-1]:
            below = below + p
            bins = bins + (noise >= below).to(torch.int16)
        return bins

    def log_prob(self, action: Tensor) -> Tensor:
        draws = action.long().reshape(-1, *action.shape[-4:]).movedim(0, 2)  # (N, V, G, Y, X)
        return self.logps.gather(2, draws).movedim(2, 0).reshape(action.shape)

    def kl(self, other: CategoricalFrames) -> Tensor:
        return (self.probs * (self.logps - other.logps)).sum(2)

    def entropy(self) -> Tensor:
        return -(self.probs * self.logps).sum(2)

    def error(self, values: Tensor) -> Tensor:
        return -self.log_prob(self.family.actions(values))

    def state(self) -> Tensor:
        return self._expected(self.family.middle)

    def mean(self) -> Tensor:
        return self._expected(self.family.middle_value)

    def _expected(self, table: Tensor) -> Tensor:
        return torch.einsum("nvkyx,vk->nvyx", self.probs, table)

    def mode(self) -> Tensor:
        return self.family.values(self.logps.argmax(dim=2))

    def exceedance(self, edges: Sequence[Sequence[float]]) -> Tensor:
        """Exact at bin edges; inside a bin probability is spread evenly in s."""
        ends = self.family.ends
        at = self.family.scale.inward(torch.tensor(edges, dtype=torch.float64)).to(ends).unsqueeze(2)  # (V, E, 1)
        above = ((ends[:, None, 1:] - at) / (ends[:, None, 1:] - ends[:, None, :-1])).clamp(0, 1)
        return torch.einsum("nvkyx,vek->nveyx", self.probs, above)

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """Inside a bin probability is spread evenly in s: the inverse of a broken line, summed bin by bin."""
        levels = torch.tensor(levels).to(self.logps).view(-1, 1, 1, 1)
        widths = self.family.ends.diff()[:, :, None, None]
        below, s = 0.0, 0.0
        for k, p in enumerate(self.probs.unbind(2)):
            p = p.unsqueeze(1)
            s = s + widths[:, k] * ((levels - below) / p.clamp(min=1e-30)).clamp(0, 1)
            below = below + p
        return self.family.scale.outward(s)


class Gaussian(nn.Module):
    """s ~ N(last + output, sigma^2) in every cell by itself; values are clipped to [0, top], log-probabilities are not.

    sigma: fixed, in s. It is a scale of exploration, not of error. Above the highest class edge class rewards are flat, and
    nothing there keeps the mean from drifting up to `top` but a dense anchor. Here that is the closed-form KL to the reference
    (`beta`), (mean - its mean)^2 / (2 sigma^2); a reward of closeness to the truth, of an app, may be another.
    """

    def __init__(self, variables: int, scale: Scale, sigma: float):
        super().__init__()
        self.scale, self.sigma, self.outputs = scale, sigma, variables

    def forward(self, output: Tensor, last: Tensor, valid: Tensor | None = None) -> GaussianFrames:
        """output (N, V, Y, X), last (N, V, Y, X) in s."""
        return GaussianFrames(last + output, last.new_tensor(self.sigma), self)

    def noise(self, count: int, cells: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Normal, (count, V, Y, X)."""
        return torch.randn(count, *cells, generator=generator)

    def actions(self, values: Tensor) -> Tensor:
        return self.scale.inward(values)

    def values(self, actions: Tensor) -> Tensor:
        return self.scale.outward(actions)

    def states(self, actions: Tensor) -> Tensor:
        return actions.clamp(0, self.scale.end)


class GaussianFrames:
    """s ~ N(centre, std^2) cell by cell; centre (N, V, Y, X), std the same or one number."""

    def __init__(self, centre: Tensor, std: Tensor, family: Gaussian):
        self.centre, self.std, self.family = centre, std, family

    def sample(self, noise: Tensor) -> Tensor:
        return self.centre + self.std * noise

    def log_prob(self, action: Tensor) -> Tensor:
        return -(((action - self.centre) / self.std).square() / 2 + self.std.log() + LOG_ROOT_TWO_PI)

    def kl(self, other: GaussianFrames) -> Tensor:
        return ((self.centre - other.centre) / self.std).square() / 2

    def entropy(self) -> Tensor:
        return (self.std.log() + LOG_ROOT_TWO_PI + 0.5).expand(self.centre.shape)

    def error(self, values: Tensor) -> Tensor:
        """Squared, in s."""
        return (self.centre - self.family.scale.inward(values)).square()

    def state(self) -> Tensor:
        return self.family.states(self.centre)

    def mean(self) -> Tensor:
        return self.family.scale.normal_mean(self.centre, self.std)

    def mode(self) -> Tensor:
        return self.family.values(self.centre)

    def exceedance(self, edges: Sequence[Sequence[float]]) -> Tensor:
        at = self.family.scale.inward(torch.tensor(edges, dtype=torch.float64)).to(self.centre)[:, :, None, None]
        std = self.std if self.std.dim() == 0 else self.std.unsqueeze(2)
        return torch.special.ndtr((self.centre.unsqueeze(2) - at) / std)

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        away = torch.special.ndtri(torch.tensor(levels, dtype=torch.float64)).to(self.centre).view(-1, 1, 1, 1)
        std = self.std if self.std.dim() == 0 else self.std.unsqueeze(1)
        return self.family.values(self.centre.unsqueeze(1) + std * away)


class LowRankGaussian(Gaussian):
    """s ~ N(last + output, sigma^2 I + W W^T) over the whole frame: white noise and `rank` smooth fields of noise.

    W_r = sigma / sqrt(rank) (1 + loading_r) cosine_r: the `rank` lowest cosines of the map (mean square 1), each weighed cell
    by cell by the net's loadings; at 0 the smooth noise has as much variance as the white.

    The log-probability is that of the joint frame, through Woodbury's identity. Each of its cells is given an equal share, and
    the shares of the valid cells sum to it exactly; cells that are not valid are integrated out. So the gradient of a mean
    over decisions is the joint score times the frame's mean advantage, which is unbiased for any reward. The terms of the
    chain rule sum to the joint too, but with credit by cell they move some means the wrong way: a cell's term also moves the
    cells it is conditioned on, by what their own rewards do not say. The price: credit by cell is no sharper here than credit
    by frame.
    """

    def __init__(self, variables: int, scale: Scale, sigma: float, rank: int):
        super().__init__(variables, scale, sigma)
        self.rank, self.variables, self.outputs = rank, variables, variables * (1 + rank)

    def forward(self, output: Tensor, last: Tensor, valid: Tensor | None = None) -> LowRankFrames:
        """output (N, V + rank * V, Y, X), last (N, V, Y, X) in s. valid (N, V, Y, X), 1 where a decision carries loss."""
        loadings = output[:, self.variables :].unflatten(1, (self.rank, self.variables))
        smooth = cosines(self.rank, *last.shape[-2:]).to(last)
        factors = self.sigma / math.sqrt(self.rank) * (1 + loadings) * smooth[:, None]
        return LowRankFrames(last + output[:, : self.variables], factors, valid, self)

    def noise(self, count: int, cells: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Normal, (count, V * Y * X + rank)."""
        return torch.randn(count, math.prod(cells) + self.rank, generator=generator)


class LowRankFrames(GaussianFrames):
    """centre (N, V, Y, X); factors (N, R, V, Y, X), the columns of W."""

    def __init__(self, centre: Tensor, factors: Tensor, valid: Tensor | None, family: LowRankGaussian):
        sigma = family.sigma
        super().__init__(centre, (sigma**2 + factors.square().sum(1)).sqrt(), family)
        self.factors = factors
        self.valid = torch.ones_like(centre) if valid is None else valid
        self.cells = self.valid.flatten(1).sum(1)  # (N,)
        self.known = (factors * self.valid.unsqueeze(1)).flatten(2) / sigma  # (N, R, D), in units of the white noise
        inner = self.known @ self.known.mT
        self.root = torch.linalg.cholesky(inner + torch.eye(len(inner[0])).to(inner))  # of I + W^T W / sigma^2
        self.log_det = 2 * self.root.diagonal(dim1=1, dim2=2).log().sum(1)  # of the covariance / sigma^2

    def _shared(self, joint: Tensor) -> Tensor:
        """([G,] N) -> equal shares, ([G,] N, V, Y, X)."""
        return (joint / self.cells.clamp(min=1))[..., None, None, None].expand(*joint.shape, *self.centre.shape[1:])

    def sample(self, noise: Tensor) -> Tensor:
        cells = self.centre[0].numel()
        smooth = torch.einsum("...nr,nrvyx->...nvyx", noise[..., cells:], self.factors)
        return self.centre + self.family.sigma * noise[..., :cells].unflatten(-1, self.centre.shape[1:]) + smooth

    def _quadratic(self, away: Tensor) -> Tensor:
        """away^T covariance^-1 away * sigma^2 of ([G,] N, D): |away|^2 - |root^-1 W^T away|^2."""
        inner = torch.einsum("nrd,...nd->...nr", self.known, away).unsqueeze(-1)
        explained = torch.linalg.solve_triangular(self.root, inner, upper=False)
        return away.square().sum(-1) - explained.square().sum((-1, -2))

    def log_prob(self, action: Tensor) -> Tensor:
        away = ((action - self.centre) * self.valid).flatten(-3) / self.family.sigma
        white = self.cells * (math.log(self.family.sigma) + LOG_ROOT_TWO_PI)
        return self._shared(-(self._quadratic(away) + self.log_det) / 2 - white)

    def kl(self, other: LowRankFrames) -> Tensor:
        away = ((self.centre - other.centre) * self.valid).flatten(1) / self.family.sigma
        across = other.known @ self.known.mT  # (N, R, R)
        inner = other.known @ other.known.mT + across @ across.mT
        explained = torch.cholesky_solve(inner, other.root).diagonal(dim1=1, dim2=2).sum(1)
        trace = self.known.square().sum((1, 2)) - explained  # of other^-1 self, less the number of cells
        return self._shared((trace + other._quadratic(away) + other.log_det - self.log_det) / 2)

    def entropy(self) -> Tensor:
        white = math.log(self.family.sigma) + LOG_ROOT_TWO_PI + 0.5
        return self._shared(self.log_det / 2 + self.cells * white)


def cosines(rank: int, rows: int, columns: int) -> Tensor:
    """The `rank` smoothest cosines of a map, (rank, Y, X), each of mean square 1. Raises ConfigError for more than cells."""
    if rank > rows * columns:
        raise ConfigError(f"rollout.rank={rank} is more than the {rows} x {columns} cells; use fewer smooth fields")
    waves = sorted(((i / rows) ** 2 + (j / columns) ** 2, i, j) for i in range(rows) for j in range(columns))
    y, x = ((torch.arange(size) + 0.5) * math.pi / size for size in (rows, columns))
    fields = torch.stack([torch.outer((i * y).cos(), (j * x).cos()) for _, i, j in waves[:rank]])
    return fields / fields.square().mean((1, 2), keepdim=True).sqrt()


TEMPERATURE = 0.03  # of two announcements, the one that is expected to cost this much more is e times rarer at first
GAIN = 25.0  # of a head's outputs: as logits they would move less in a hundred updates than costs ask for


class Decided(Categorical):
    """Which class is announced, by a head of its own, beside a forecast that goes on saying what it learned.

        log p_a = -sum_c C[c, a] P(class c by the forecast, no gradient) / TEMPERATURE + GAIN * what the head adds + constant

    A head of zeros most often announces what costs least by the forecast, the Bayes decision; rewards move it from there, and
    with it the net's inner layers. Values, probabilities and what is fed back are the forecast's, and the divergence from a
    reference counts the forecast's too.

    An action is the number of a class. Its value is the middle of the class, in s: good for rewards of classes alone.
    costs: (C, C), [observed, announced]; None: 1 for every wrong class, so that the likeliest class costs least. Ours.
    """

    def __init__(
        self,
        forecast: nn.Module,
        edges: Sequence[Sequence[float]],
        scale: Scale,
        costs: Sequence[Sequence[float]] | None = None,
    ):
        super().__init__(edges, scale, bins=len(edges[0]) + 1)
        self.forecast, self.edges = forecast, edges
        self.outputs = forecast.outputs + len(edges) * self.bins
        costs = 1 - torch.eye(self.bins) if costs is None else torch.tensor(costs)
        self.register_buffer("costs", costs.float(), persistent=False)

    def forward(self, output: Tensor, last: Tensor, valid: Tensor | None = None) -> DecidedFrames:
        """output (N, those of the forecast and then V * classes, Y, X), last (N, V, Y, X) in s."""
        own, head = output.split([self.forecast.outputs, output.shape[1] - self.forecast.outputs], dim=1)
        frames = self.forecast(own, last, valid)
        chances = classes_of(frames.exceedance(self.edges).detach())
        expected = torch.einsum("nvcyx,ca->nvayx", chances, self.costs)
        logits = GAIN * head.unflatten(1, (-1, self.bins)) - expected / TEMPERATURE
        return DecidedFrames(logits.log_softmax(dim=2), self, frames)


class DecidedFrames(CategoricalFrames):
    """logps: of classes, (N, V, C, Y, X), the actions. All but them is said by `forecast`."""

    def __init__(self, logps: Tensor, family: Decided, forecast: Distribution):
        super().__init__(logps, family)
        self.forecast = forecast

    def announced(self) -> Tensor:
        """The likeliest class, of equals the lowest, (N, V, Y, X)."""
        return self.logps.argmax(dim=2)

    def kl(self, other: DecidedFrames) -> Tensor:
        """Of the decision and of the forecast: the anchor that keeps what rewards do not look at."""
        return super().kl(other) + self.forecast.kl(other.forecast)

    def error(self, values: Tensor) -> Tensor:
        return self.forecast.error(values)

    def state(self) -> Tensor:
        return self.forecast.state()

    def mean(self) -> Tensor:
        return self.forecast.mean()

    def mode(self) -> Tensor:
        return self.forecast.mode()

    def exceedance(self, edges: Sequence[Sequence[float]]) -> Tensor:
        return self.forecast.exceedance(edges)

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        return self.forecast.quantiles(levels)


def classes_of(exceed: Tensor) -> Tensor:
    """P(class) of P(value >= edge), (N, V, E, Y, X) -> (N, V, E + 1, Y, X)."""
    whole, none = torch.ones_like(exceed[:, :, :1]), torch.zeros_like(exceed[:, :, :1])
    return -torch.cat([whole, exceed, none], dim=2).diff(dim=2)


def family(rollout: ForecastRollout, quantity: Quantity) -> nn.Module:
    """The family that a config asks for.

    Raises ConfigError for more classes than bins, and for decide=head with feedback=sample: a class is no value to go on from.
    """
    scale, variables = Scale(quantity.scale, quantity.top), len(quantity.variables)
    if rollout.distribution == "categorical":
        made = Categorical(quantity.edges, scale, rollout.bins)
    elif rollout.distribution == "gaussian":
        made = Gaussian(variables, scale, rollout.sigma)
    else:
        made = LowRankGaussian(variables, scale, rollout.sigma, rollout.rank)
    if rollout.decide != "head":
        return made
    if rollout.feedback == "sample":
        raise ConfigError(
            "rollout.decide=head draws classes, which are no values to go on from (rollout.feedback=sample); "
            "use feedback=mean or decide=class"
        )
    return Decided(made, quantity.edges, scale, quantity.costs)
