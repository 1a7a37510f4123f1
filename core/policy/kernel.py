"""One denoising step of a flow policy as a Gaussian decision: schedules, transition kernels, log-probabilities, noise.

`sigma` runs from 1 (noise) to 0 (data). On the path x = (1 - sigma) x0 + sigma x1, with x1 = centre + scale * noise; a net
predicts v = x1 - x0. A step goes from `sigma` down to `sigma_next`; dt = sigma_next - sigma < 0. Of every kernel the next
state is N(mean, std^2 I) with a mean that is linear in x, v and the centre. In the other convention (t = 1 - sigma, data
at 1, velocity u = -v) the same numbers come out.

Sums, exponents and logarithms run in float32 (float64 if x is float64), whatever the net's dtype: the clip ranges of flow
policies are 1e-5 to 1e-3, and a log-probability in bfloat16 is wrong by more than that.

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818), Flow-CPS (2509.05952), SAGE-GRPO (2603.21872), read in the
authors' code; MixGRPO (2507.21802) for windows. The centred prior is derived here for arXiv 2601.16483.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

KernelName = Literal["flow", "dance", "cps", "sage", "ode"]
WindowName = Literal["all", "first", "sliding", "random"]

SAGE_CLAMP = 3e-3  # SAGE's integral diverges at sigma = 1; its logarithm reads 1 - sigma as no less than this
LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Schedule:
    """The T + 1 sigmas of T denoising steps: from 1 down to exactly 0, strictly decreasing.

    A net's scheduler may end elsewhere (diffusers' default grid puts 0.001 before 0), so the sigmas are always explicit.
    Raises ValueError for sigmas that start, end or move otherwise.
    """

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        if len(self.sigmas) < 2 or self.sigmas[0] != 1.0 or self.sigmas[-1] != 0.0:
            raise ValueError(f"sigmas={self.sigmas} must hold 2 or more values, start at 1 and end at exactly 0")
        for at, (sigma, sigma_next) in enumerate(pairwise(self.sigmas)):
            if not sigma_next < sigma:
                raise ValueError(f"sigmas[{at + 1}]={sigma_next} is not below sigmas[{at}]={sigma}; make them fall")

    @classmethod
    def uniform(cls, steps: int, shift: float = 1.0) -> Schedule:
        """`steps` steps of equal length before the shift s -> k s / (1 + (k - 1) s), k > 0; k > 1 stays longer near noise."""
        if steps < 1:
            raise ValueError(f"steps={steps} makes no schedule; use 1 or more")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift} is no positive number; use 1 for equal steps, 3 to 5 for large images")
        flat = [1 - step / steps for step in range(steps + 1)]
        return cls(tuple(shift * sigma / (1 + (shift - 1) * sigma) for sigma in flat))

    def shortcut(self, after: int, steps: int) -> Schedule:
        """The first `after` steps as they are, then `steps` steps of equal length down to 0.

        Source: arXiv 2601.02356, read in the authors' code, whose last step stops above 0; this one ends at 0.
        """
        if not 0 <= after < len(self):
            raise ValueError(
                f"after={after} leaves nothing of the {len(self)} steps to shorten; use 0 to {len(self) - 1}"
            )
        if steps < 1:
            raise ValueError(f"steps={steps} does not reach sigma=0; use 1 or more")
        tail = [self.sigmas[after] * (1 - step / steps) for step in range(1, steps + 1)]
        return Schedule((*self.sigmas[: after + 1], *tail))

    def __len__(self) -> int:
        return len(self.sigmas) - 1


@dataclass(frozen=True, eq=False)
class Centred:
    """The noise end of the path: x1 ~ N(centre, scale^2 I). `STANDARD` is N(0, I).

    centre: a number, or a tensor that broadcasts over x (speech: the noisy input). scale: > 0. In the coordinates
    (x - sigma centre) / scale and (v - centre) / scale the prior is the standard one; a test holds every kernel to it.
    Raises ValueError for a scale that is not positive.
    """

    centre: Tensor | float
    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(
                f"scale={self.scale} of the prior is no positive number; a prior without spread has no score"
            )

    def start(self, noise: Tensor) -> Tensor:
        """x at sigma = 1 from standard normal noise of the same shape."""
        return self.centre + self.scale * _working(noise)

    def noised(self, x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """x at `sigma` on the straight path from x0 to start(noise). sigma: a number or (B,)."""
        x0, sigma = _working(x0), _over(sigma, x0)
        return (1 - sigma) * x0 + sigma * self.start(noise)

    def clean(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
        """The x0 that x and v point at: x - sigma v."""
        return _working(x) - _over(sigma, x) * _working(v)

    def score(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
        """The gradient of the log-density of x at `sigma`: -(x + (1 - sigma) v - centre) / (sigma scale^2).

        x + (1 - sigma) v estimates x1. Source: DanceGRPO's code for N(0, I); the centred form is derived: given x0, x is
        normal around (1 - sigma) x0 + sigma centre with deviation sigma scale; v as E[x1 - x0 | x] gives the marginal's.
        """
        sigma = _over(sigma, x)
        return -(_working(x) + (1 - sigma) * _working(v) - self.centre) / (sigma * self.scale**2)


Prior = Centred
STANDARD = Centred(centre=0.0, scale=1.0)


@dataclass(frozen=True)
class Kernel:
    """p(x_next | x) = N(mean, std^2 I) of one step.

    With s = sigma, s' = sigma_next, a = noise_level, all for a prior of scale 1 (std scales with the prior):

        flow    std = a sqrt(s / (1 - s)) sqrt(-dt); at s = 1 that 1 - s is read as 1 - s'
        dance   std = a sqrt(-dt)
        sage    std^2 = a^2 * integral of r / (1 - r) over [s', s] = a^2 (ln((1 - s') / (1 - s)) - (s - s'))
        ode     std = 0: no density
        cps     std = s' sin(a pi / 2);  mean = (1 - s') x0 + s' centre + s' cos(a pi / 2) (x1 - centre)

    The first four share mean = x + v dt + std^2 / 2 score, which keeps the marginals of the ODE as steps get short. cps has
    the right amount of noise on the path at any step length, and std = 0 at s' = 0; a = 1 is diffusers'
    stochastic_sampling. flow, dance and sage have std > 0 on the last step too: its noise would stay in the sample, so
    `Window` leaves it out. The authors' cps code puts -mean((x_next - mean)^2) in place of the log-probability: no density,
    and 2 std^2 times the gradient, so a clip range of theirs (1e-5) does not carry over.

    noise_level: flow 0.4 to 1, dance 0.25 to 0.3, cps 0.8 (at most 1), sage 0.5 in the papers; 0 for ode only.
    Raises ValueError for an unknown name, or a noise level outside its range.
    """

    name: KernelName
    noise_level: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in get_args(KernelName):
            raise ValueError(f"kernel={self.name!r} is unknown; use one of {', '.join(get_args(KernelName))}")
        if self.name == "ode" and self.noise_level != 0:
            raise ValueError(f"noise_level={self.noise_level} does nothing in the kernel ode; use 0, or another kernel")
        if self.name != "ode" and not 0 < self.noise_level < math.inf:
            raise ValueError(
                f"noise_level={self.noise_level} gives the kernel {self.name} no density; use more than 0, or the kernel ode"
            )
        if self.name == "cps" and self.noise_level > 1:
            raise ValueError(
                f"noise_level={self.noise_level} of the kernel cps lies above 1, which is full noise; use at most 1"
            )

    def std(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """The deviation of a step for a prior of scale 1: () or (B,), float64 for numbers, else the tensors' dtype.

        Raises ValueError unless 0 <= sigma_next < sigma <= 1, or if sage's clamp leaves no variance.
        """
        sigma, sigma_next = _tensor(sigma), _tensor(sigma_next)
        if not ((sigma_next >= 0) & (sigma_next < sigma) & (sigma <= 1)).all():
            raise ValueError(
                f"sigma={sigma.tolist()} to sigma_next={sigma_next.tolist()} is no step down within [0, 1]"
            )
        length = sigma - sigma_next
        if self.name == "flow":
            room = torch.where(sigma == 1, 1 - sigma_next, 1 - sigma)
            return self.noise_level * torch.sqrt(sigma / room * length)
        if self.name == "dance":
            return self.noise_level * torch.sqrt(length)
        if self.name == "cps":
            return sigma_next * math.sin(self.noise_level * math.pi / 2)
        if self.name == "sage":
            clamped = sigma.clamp(max=1 - SAGE_CLAMP)
            variance = torch.log1p((clamped - sigma_next) / (1 - clamped)) - length
            if not (variance > 0).all():
                raise ValueError(
                    f"sage has no variance from sigma={sigma.tolist()} to {sigma_next.tolist()}: its integral is cut at "
                    f"{1 - SAGE_CLAMP}; use fewer steps, a smaller shift or the kernel flow"
                )
            return self.noise_level * torch.sqrt(variance)
        return torch.zeros_like(length)

    def sd(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """The diffusion coefficient that is constant over the step and has its std: std / sqrt(sigma - sigma_next)."""
        return self.std(sigma, sigma_next) / torch.sqrt(_tensor(sigma) - _tensor(sigma_next))

    def slope(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """d mean / d v of a step, negative: () or (B,)."""
        return self._coefficients(_tensor(sigma), _tensor(sigma_next))[1]

    def step(
        self, x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, prior: Prior = STANDARD
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of x at `sigma_next`.

        x, v: (B, ...), v with gradient. sigma, sigma_next: numbers or (B,). Returns mean (B, ...) and std, () or
        (B, 1, ...), both float32 (float64 if x is). std is 0 for ode and for cps at sigma_next = 0: the next x is the mean.
        Raises ValueError as `std` does.
        """
        x = _working(x)
        sigma, sigma_next = _over(sigma, x), _over(sigma_next, x)
        of_x, of_v, of_centre, std = self._coefficients(sigma, sigma_next)
        mean = of_x * x + of_v * _working(v)
        if isinstance(prior.centre, Tensor) or prior.centre:
            mean = mean + of_centre * prior.centre
        return mean, prior.scale * std

    def _coefficients(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What x, v and the centre are multiplied by in the mean, and std for scale 1."""
        std = self.std(sigma, sigma_next)
        if self.name == "cps":
            kept = sigma_next * math.cos(self.noise_level * math.pi / 2)
            return 1 - sigma_next + kept, kept * (1 - sigma) - (1 - sigma_next) * sigma, sigma_next - kept, std
        pull = std**2 / (2 * sigma)
        return 1 - pull, sigma_next - sigma - pull * (1 - sigma), pull, std


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B,) log-density of x_next under N(mean, std^2 I), in nats per element: the mean over a row's elements.

    x_next, mean: (B, ...); x_next is taken without gradient. std: () or one per row, as `Kernel.step` gives it.
    valid: 1 or True where an element counts, broadcast over x; the others may hold anything, NaN too.
    The mean, not the sum: the log-ratio does not grow with the number of elements, so that a clip range of 1e-5 to 1e-3
    serves every size. Source: arXiv 2505.05470, read in the authors' code; the mean over valid elements is derived.
    Raises ValueError where std is not positive, or for a row without a valid element.
    """
    mean = _working(mean)
    std = _deviation(std, mean)
    squares = _row_mean((x_next.detach() - mean), valid)
    return -squares / (2 * std**2) - torch.log(std) - LOG_ROOT_TWO_PI


def divergence(
    mean: Tensor,
    ref_mean: Tensor,
    std: Tensor,
    valid: Tensor | None = None,
    form: Literal["exact", "code"] = "exact",
    dt: float | Tensor | None = None,
) -> Tensor:
    """(B,) KL between the decisions N(mean, std^2 I) and N(ref_mean, std^2 I), in nats per element.

    exact: mean((mean - ref_mean)^2) / (2 std^2); with mean and ref_mean from new and old policy it is GRPO-Guard's drift.
    code: what Flow-GRPO's public code computes. It divides by 2 sd^2 where std^2 = sd^2 |dt| belongs: dt is missing, so
    the value is |dt| times the true one, a tenth at ten equal steps. Published weights (beta 0.004 to 0.04) are in that
    unit: times |dt| for `exact`.
    mean, ref_mean, std, valid: as in `log_prob`. dt: sigma_next - sigma, a number or (B,), for `code` only; its sign does
    not matter. Raises ValueError as `log_prob` does, for an unknown form, and for `code` without dt.
    """
    mean = _working(mean)
    std = _deviation(std, mean)
    exact = _row_mean(mean - ref_mean, valid) / (2 * std**2)
    if form == "exact":
        return exact
    if form != "code":
        raise ValueError(f"divergence={form!r} is unknown; use exact or code")
    if dt is None:
        raise ValueError("divergence=code multiplies by the length of the step and dt is None; give sigma_next - sigma")
    return exact * abs(dt)


def equalizer(kernel: Kernel, schedule: Schedule) -> Tensor:
    """(T,) float64 weights that give every step's policy gradient the same scale: median(N) / N, N = |d mean / d v| / std.

    Multiplies the clipped policy loss of a step, not its KL. The median over all T steps is torch's: of an even number the
    lower middle. A step without density (ode, the last of cps) weighs 1; SAGE's code divides by 1e-12 there, a weight of 0.
    Source: arXiv 2603.21872, read in the authors' code.
    """
    sigmas = torch.tensor(schedule.sigmas, dtype=torch.float64)
    norms = kernel.slope(sigmas[:-1], sigmas[1:]).abs() / kernel.std(sigmas[:-1], sigmas[1:])
    weights = norms.median() / norms
    return torch.where(torch.isfinite(norms) & (norms > 0) & torch.isfinite(weights), weights, 1.0)


def draw(shape: tuple[int, ...], group_size: int, generator: torch.Generator, antithetic: bool = False) -> Tensor:
    """Standard normal noise (B, ...), float32, on the generator's device; rows p * G to p * G + G - 1 are group p.

    antithetic: rows 2 i and 2 i + 1 of a group are z and -z, so that a pair's noise cancels in the group's mean; the last
    row of an odd group has noise of its own. Each row alone is standard normal.
    Raises ValueError unless group_size divides B.
    """
    if group_size < 1 or shape[0] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {shape[0]} rows of noise; use whole groups")
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if antithetic:
        groups = noise.unflatten(0, (-1, group_size))
        pairs = group_size // 2
        groups[:, 1 : 2 * pairs : 2] = -groups[:, 0 : 2 * pairs : 2]
    return noise


@dataclass(frozen=True)
class Window:
    """Which steps of an update are stochastic and trained; the others are ODE steps. The last step always is one.

        all       every step but the last
        first     the first `size`
        sliding   `size` from a start that moves up by 1 every `every` updates and wraps to 0 (MixGRPO, progressive)
        random    `size` from a start drawn for each update; the same for the same seed and update

    size: for all of them but `all`, 1 to T - 1.
    Raises ValueError for an unknown name, or a size or pace below 1.
    """

    name: WindowName = "all"
    size: int = 0
    every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in get_args(WindowName):
            raise ValueError(f"window={self.name!r} is unknown; use one of {', '.join(get_args(WindowName))}")
        if self.name != "all" and self.size < 1:
            raise ValueError(f"window_size={self.size} leaves the window {self.name} empty; use 1 or more")
        if self.name == "sliding" and self.every < 1:
            raise ValueError(f"window_every={self.every} is no number of updates; use 1 or more")

    def steps(self, update: int, total: int) -> range:
        """The stochastic steps of update number `update` (from 0) in a schedule of `total` steps T.

        Raises ValueError if the window does not fit into the first T - 1 steps.
        """
        if total < 2:
            raise ValueError(f"steps={total} leaves no stochastic step, since the last is an ODE step; use 2 or more")
        if self.name == "all":
            return range(total - 1)
        starts = total - self.size
        if starts < 1:
            raise ValueError(
                f"window_size={self.size} does not fit before the last of {total} steps; use 1 to {total - 1}"
            )
        if self.name == "first":
            start = 0
        elif self.name == "sliding":
            start = update // self.every % starts
        else:
            start = random.Random(f"{self.seed} {update}").randrange(starts)
        return range(start, start + self.size)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _over(sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma as () or (B, 1, ...), in the dtype of the work on x: a number and a tensor of it give the same bits."""
    sigma = torch.as_tensor(sigma, dtype=_working(x[:0]).dtype, device=x.device)
    if sigma.dim() == 0:
        return sigma
    if sigma.shape != x.shape[:1]:
        raise ValueError(
            f"sigma of shape {tuple(sigma.shape)} does not fit x of shape {tuple(x.shape)}; use a number or one per row"
        )
    return sigma.reshape(-1, *[1] * (x.dim() - 1))


def _deviation(std: Tensor, mean: Tensor) -> Tensor:
    """std as () or (B,). Refused where there is no density, which an infinite log-probability would only hide."""
    if std.numel() not in (1, len(mean)):
        raise ValueError(
            f"std of shape {tuple(std.shape)} is neither one number nor one per row of {tuple(mean.shape)}"
        )
    if not (std > 0).all():
        raise ValueError(
            f"std={std.flatten().tolist()} has no density where it is not positive (an ODE step, or the last of cps); "
            "leave such steps out, as Window does"
        )
    return std.reshape(() if std.numel() == 1 else -1)


def _row_mean(difference: Tensor, valid: Tensor | None) -> Tensor:
    """(B,) mean square over the valid elements of each row."""
    if valid is None:
        return difference.flatten(1).square().mean(1)
    valid = valid.bool().expand_as(difference).flatten(1)
    counts = valid.sum(1)
    if not counts.all():
        raise ValueError(f"rows {(counts == 0).nonzero().flatten().tolist()} have no valid element; drop them")
    # Masked before the square: an invalid NaN would come back through the gradient of anything later.
    return torch.where(valid, difference.flatten(1), 0.0).square().sum(1) / counts
