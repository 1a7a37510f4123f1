"""Flow-matching policies: one decision is one noisy denoising step.

A net predicts the velocity v = dx/dsigma of a path from noise (sigma 1) to data (sigma 0). A rollout follows the schedule;
inside a window of steps noise is added (core/policy/kernel.py), and these steps are the decisions: Gaussians whose mean the
net decides. All other steps, and always the last one, follow the ODE. Guidance is part of the policy: it is the same in a
rollout and when its decisions are weighed again.

The chance of a rollout is a function of its prompt's seed alone, not of ranks or batch sizes. All states are float32.

Not covered: kernels whose noise has more than one scale for a step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.config import ConfigError, FlowRollout, Model
from core.objective.composition import GIVES
from core.policy.kernel import Kernel, Prior, Schedule, Window, divergence, draw, equalizer, log_prob
from core.policy.trajectory import Decisions, Trajectory, TrajectoryModule, joined, slices

if TYPE_CHECKING:
    from core.objective.recipes import Recipe

Condition = dict[str, Tensor]  # first dimension: rows; "valid", if there, marks the elements of x that count
GIVEN = "condition/"  # prefix of the condition's tensors in a trajectory's state
ENOUGH = 0.9  # window=active: the share of the greatest variance that a shorter window must keep


class FlowNet(Protocol):
    """An nn.Module that predicts velocities; its parameters with gradient are what learns."""

    def encode(self, conditions: Sequence[Mapping[str, Any]]) -> Condition:
        """N rows' conditions as tensors of first dimension N, on the net's device; no gradient."""

    def unconditional(self, condition: Condition) -> Condition:
        """The same without the instruction, for guidance."""

    def noise_shape(self, condition: Condition) -> tuple[int, ...]:
        """Of one x."""

    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x: (B, ...), sigma: (B,). Returns v = dx/dsigma, (B, ...)."""

    def decode(self, x: Tensor, condition: Condition) -> list[np.ndarray]:
        """What a reward sees of the data points x, (B, ...): B arrays; no gradient."""

    def encode_target(self, outputs: Sequence[np.ndarray], condition: Condition) -> Tensor:
        """The data points of outputs: what `decode` undoes; for a supervised start."""

    def prior(self, condition: Condition) -> Prior:
        """Where paths start."""

    def reference(self) -> contextlib.AbstractContextManager:
        """The net as it was before training, while the block runs. Raises ValueError if it has no adapter to turn off."""

    def save(self, folder: Path) -> None:
        """What was trained, through save_pretrained."""

    def restore(self, folder: Path) -> None:
        """Takes the weights that `save` wrote there."""


class FlowPolicy(TrajectoryModule):
    """A net with the way it is sampled; see the module docstring.

    half: compute velocities in bfloat16, in rollouts and in `forward` alike. Raises ValueError for steps, a shift or a noise
    level that Schedule or Kernel refuse; a window is only looked at when it is used.
    """

    provides = GIVES["flow"]

    def __init__(self, net: nn.Module, rollout: FlowRollout, half: bool = False):
        super().__init__(net, rollout, half)
        self.schedule = Schedule.uniform(rollout.steps, rollout.shift)
        self.kernel = Kernel(rollout.kernel, rollout.noise_level)
        self.active: int | None = None  # window=active: how many steps are noisy, once it has been measured

    @classmethod
    def refuse(cls, recipe: Recipe, settings: FlowRollout) -> None:
        if "renoised" in recipe.needs and settings.shared_noise:
            raise ConfigError(
                f"recipe {recipe.name} samples without noisy steps: with rollout.shared_noise=true all rollouts of a group are "
                f"one; set rollout.shared_noise=false"
            )
        if settings.window == "active" and not settings.shared_noise:
            raise ConfigError(
                "rollout.window=active measures the spread that noisy steps make, which rollouts of different starts hide; set "
                "rollout.shared_noise=true, or window=first with a window_size"
            )

    # -- acting ---------------------------------------------------------------------------------------------------------

    def window(self, batch: int) -> range:
        """The noisy steps of a generation batch, counted from 0. Raises ValueError for a window that does not fit."""
        settings = self.settings
        if settings.window == "active":
            if self.active is None:
                raise ValueError("window=active has not been measured; the trainer does that before the first rollout")
            return Window("first", self.active).steps(batch, len(self.schedule))
        window = Window(settings.window, settings.window_size, settings.window_every)
        return window.steps(batch, len(self.schedule))

    def path(self, window: range) -> Schedule:
        """The schedule of a rollout: after the window, `shortcut` large steps if that is set."""
        cut = self.settings.shortcut
        return self.schedule.shortcut(window.stop, cut) if cut else self.schedule

    @property
    def units(self) -> int:
        return max(1, len(self.schedule) - 1)

    @property
    def unmeasured(self) -> bool:
        return self.settings.window == "active" and self.active is None

    def measure(
        self,
        conditions: Sequence[Mapping[str, Any]],
        group_size: int,
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        judge: Callable[[list[np.ndarray]], Tensor],
    ) -> dict[str, float]:
        """window=active: how many steps are worth being noisy, by the spread of rewards that they make within groups.

        The policy of now is sampled with the first k steps noisy, for every k; the smallest k that keeps ENOUGH of the
        greatest variance is taken (arXiv 2601.02356 keeps the steps of highest variance; the share is ours), and all steps if
        no rewards differ.
        """
        variance = []
        for k in range(1, len(self.schedule)):
            total = judge(self.rollout(conditions, group_size, seeds, batch_size=batch_size, window=range(k)).outputs)
            variance.append(float(total.var(dim=1, correction=1).mean()) if len(total) else 0.0)
        enough = (k for k, v in enumerate(variance, 1) if v and v >= ENOUGH * max(variance))
        self.active = next(enough, len(variance))
        return {"active/steps": float(self.active)} | {f"active/variance_{k}": v for k, v in enumerate(variance, 1)}

    @torch.no_grad()
    def rollout(
        self,
        conditions: Sequence[Mapping[str, Any]],
        group_size: int,
        seeds: Sequence[int],
        *,
        batch: int = 0,
        batch_size: int | None = None,
        asks: frozenset[str] = frozenset(),
        window: range | None = None,
    ) -> Trajectory:
        """See TrajectoryModule. window: other noisy steps than those of `batch`.

        asks: "aligned" keeps estimates; "divergence" the reference's velocities, "drift" the sampler's means; "renoised" makes
        rollouts without noise and noises their outputs again, at every sigma above 0, for forward-process losses.
        """
        condition = self.net.encode(conditions)
        shape, count = tuple(self.net.noise_shape(condition)), len(conditions) * group_size
        condition = {name: part.repeat_interleave(group_size, dim=0) for name, part in condition.items()}
        if "renoised" in asks:  # nothing is noisy; every sigma above 0 is one to come back from
            window = range(len(self.schedule))
        window = self.window(batch) if window is None else window
        path = self.schedule if "renoised" in asks else self.path(window)
        drawn = (self._noise(shape, group_size, seed, len(window), "renoised" in asks) for seed in seeds)
        noise = [torch.cat(groups) for groups in zip(*drawn, strict=True)]
        make, parts = self._renoised if "renoised" in asks else self._noisy, []
        for rows in slices(count, batch_size):
            given = {name: part[rows] for name, part in condition.items()}
            start, added = (part[rows].to(**self._like) for part in noise)
            parts.append(make(given, start, added, path, window, asks))
        return joined(parts)

    @property
    def _like(self) -> dict[str, Any]:
        """Where states live, and their dtype: float32 whatever the net's, or float64."""
        weight = next(self.net.parameters())
        return {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}

    def _noise(
        self, shape: tuple[int, ...], group_size: int, seed: int, steps: int, common: bool
    ) -> tuple[Tensor, Tensor]:
        """Of one group: where it starts, (G, ...), and what is added at each step, (G, T, ...), `common` to all or not."""
        generator = torch.Generator().manual_seed(seed)
        if self.settings.shared_noise:
            start = torch.randn(1, *shape, generator=generator).expand(group_size, *shape)
        else:
            start = torch.randn(group_size, *shape, generator=generator)
        if common:  # a forward-process loss compares a group: noise of their own would only blur what differs
            added = [torch.randn(1, *shape, generator=generator).expand(group_size, *shape) for _ in range(steps)]
        else:
            added = [draw((group_size, *shape), group_size, generator, self.settings.antithetic) for _ in range(steps)]
        return start, torch.stack(added, dim=1)

    def _noisy(self, given, start, added, path: Schedule, window: range, asks) -> Trajectory:
        """Rollouts of some rows: the ODE outside the window, noise inside it."""
        prior, valid = self.net.prior(given), given.get("valid")
        x, states, logps, means, estimates = prior.start(start), [], [], [], []
        for i, (sigma, after) in enumerate(pairwise(path.sigmas)):
            v = self.velocity(x, sigma, given)
            if "aligned" in asks and window.start < i < window.stop:
                estimates.append(self.net.decode(prior.clean(x, v, sigma), given))
            if i in window:
                mean, std = self.kernel.step(x, v, sigma, after, prior)
                states.append(x)
                x = mean + std * added[:, i - window.start]
                logps.append(log_prob(x, mean, std, valid))
                means += [mean] if "drift" in asks else []
                if i + 1 == window.stop:
                    states.append(x)
            else:
                x = x + v * (after - sigma)
        outputs = self.net.decode(x, given)
        if "aligned" in asks:  # after the window all is decided: the last decision's promise is the output itself
            estimates.append(outputs)
        count, sigmas = len(x), x.new_tensor(path.sigmas)
        state = {
            "x": torch.stack(states, dim=1),
            "sigma": sigmas[window.start : window.stop].expand(count, -1),
            "after": sigmas[window.start + 1 : window.stop + 1].expand(count, -1),
            **{f"{GIVEN}{name}": part for name, part in given.items()},
        }
        if self.settings.equalize:
            scale = equalizer(self.kernel, self.schedule)[window.start : window.stop]  # a shortcut is no decision
            state["weight"] = scale.to(x).expand(count, -1)
        if means:
            state["mean"] = torch.stack(means, dim=1)
        trajectory = Trajectory(
            torch.stack(logps, dim=1), x.new_ones(count, len(window)), state, outputs, estimates if estimates else None
        )
        if "divergence" in asks:
            at = zip(states[:-1], path.sigmas[window.start : window.stop], strict=True)
            state["reference"] = torch.stack([self.reference_velocity(*one, given) for one in at], dim=1)
        return trajectory

    def _renoised(self, given, start, added, path: Schedule, window: range, asks) -> Trajectory:
        """Rollouts of some rows by the ODE, and their ends on the way back: noised again at each sigma of the window."""
        prior, sigmas = self.net.prior(given), path.sigmas[window.start : window.stop]
        clean = self._ode(prior.start(start), path, given)
        noised = [prior.noised(clean, added[:, t], sigma) for t, sigma in enumerate(sigmas)]
        at = list(zip(noised, sigmas, strict=True))
        state = {
            "clean": clean,
            "noised": torch.stack(noised, dim=1),
            "sigma": clean.new_tensor(sigmas).expand(len(clean), -1),
            "old": torch.stack([self.velocity(*one, given) for one in at], dim=1),
            "reference": torch.stack([self.reference_velocity(*one, given) for one in at], dim=1),
            **{f"{GIVEN}{name}": part for name, part in given.items()},
        }
        zeros = clean.new_zeros(len(clean), len(window))
        return Trajectory(zeros, torch.ones_like(zeros), state, self.net.decode(clean, given))

    def _ode(self, x: Tensor, path: Schedule, given: Condition) -> Tensor:
        for sigma, after in pairwise(path.sigmas):
            x = x + self.velocity(x, sigma, given) * (after - sigma)
        return x

    @torch.no_grad()
    def generate(
        self,
        conditions: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        steps: int | None = None,
        batch_size: int = 64,
    ) -> list[np.ndarray]:
        """One output a condition, by the ODE in `steps` steps (None: a rollout's), with averaged weights if there are."""
        path = Schedule.uniform(steps or self.settings.steps, self.settings.shift)
        outputs = []
        with self.averaged():
            for rows in slices(len(conditions), batch_size):
                given = self.net.encode(conditions[rows])
                shape = tuple(self.net.noise_shape(given))
                noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds[rows]]
                start = torch.stack(noise).to(**self._like)
                outputs += self.net.decode(self._ode(self.net.prior(given).start(start), path, given), given)
        return outputs

    # -- weighing what was done -------------------------------------------------------------------------------------------

    def forward(self, trajectory: Trajectory, steps: slice = slice(None)) -> Decisions:
        """The decisions `steps` of every row under the weights of now, all in one pass of the net."""
        state = trajectory.state
        given = {name.removeprefix(GIVEN): part for name, part in state.items() if name.startswith(GIVEN)}
        if "clean" in state:
            return self._denoised(state, given, steps)
        x, ends = state["x"][:, :-1][:, steps], state["x"][:, 1:][:, steps]
        count, width = x.shape[:2]
        given, valid = repeated(given, width), given.get("valid")
        valid = None if valid is None else valid.repeat_interleave(width, dim=0)
        sigma, after = (state[name][:, steps].flatten() for name in ("sigma", "after"))
        x, ends, prior = x.flatten(0, 1), ends.flatten(0, 1), self.net.prior(given)

        def rows(values: Tensor) -> Tensor:
            return values.view(count, width)

        mean, std = self.kernel.step(x, self.velocity(x, sigma, given), sigma, after, prior)
        extras = {}
        if "reference" in state:
            v = state["reference"][:, steps].flatten(0, 1)
            reference = self.kernel.step(x, v, sigma, after, prior)[0]
            form = self.settings.divergence
            extras["divergence"] = rows(divergence(mean, reference, std, valid, form, dt=sigma - after))
        if "mean" in state:
            old = state["mean"][:, steps].flatten(0, 1)
            extras["mean"] = mean.detach().view(count, width, *mean.shape[1:])
            extras["drift"] = rows(divergence(mean, old, std, valid))
            extras["std"] = rows(std.flatten())
            extras["dt"] = rows(sigma - after)
        weight = state["weight"][:, steps] if "weight" in state else None
        return Decisions(rows(log_prob(ends, mean, std, valid)), weight=weight, extras=extras)

    def _denoised(self, state: Mapping[str, Tensor], given: Condition, steps: slice) -> Decisions:
        """What a forward-process loss compares: velocities at the noised outputs, flattened to (B, t, D)."""
        noised, sigma = state["noised"][:, steps], state["sigma"][:, steps]
        v = self.velocity(noised.flatten(0, 1), sigma.flatten(), repeated(given, sigma.shape[1]))
        extras = {
            "velocity": v.view(noised.shape),
            "old_velocity": state["old"][:, steps],
            "ref_velocity": state["reference"][:, steps],
            "noised": noised,
            "clean": state["clean"].unsqueeze(1).expand(noised.shape),
        }
        if "valid" in given:  # padding, all zeros, has no error
            valid = given["valid"].bool().unsqueeze(1)
            extras = {name: torch.where(valid, part, 0.0) for name, part in extras.items()}
        extras = {name: part.flatten(2) for name, part in extras.items()} | {"sigma": sigma}
        return Decisions(torch.zeros_like(sigma), extras=extras)

    def velocity(self, x: Tensor, sigma: Tensor | float, given: Condition, net: nn.Module | None = None) -> Tensor:
        """The guided velocity, in the dtype of x; the branch without instruction carries no gradient."""
        net, settings = self.net if net is None else net, self.settings
        sigma = x.new_full((len(x),), sigma) if isinstance(sigma, float) else sigma
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            v = net.velocity(x, sigma, given).to(x.dtype)
            if settings.guidance == 1.0:
                return v
            with torch.no_grad():
                free = net.velocity(x, sigma, net.unconditional(given)).to(x.dtype)
        guided = free + settings.guidance * (v - free)
        if settings.guidance_rescale:
            axis = -1 if v.dim() == 3 else 1  # tokens (B, L, C), or maps (B, C, ...)
            guided = guided * (v.norm(dim=axis, keepdim=True) / guided.norm(dim=axis, keepdim=True).clamp(min=1e-8))
        return guided

    # -- other weights than those of now ----------------------------------------------------------------------------------

    @torch.no_grad()
    def reference_velocity(self, x: Tensor, sigma: Tensor | float, given: Condition) -> Tensor:
        """The velocity of the policy as it was before training."""
        with self.reference() as net:
            return self.velocity(x, sigma, given, net)

    def memory(self) -> dict[str, Any]:
        return {"active": self.active} | super().memory()

    def remember(self, memory: Mapping[str, Any]) -> None:
        self.active = memory["active"]
        super().remember(memory)


def repeated(given: Condition, times: int) -> Condition:
    return {name: part.repeat_interleave(times, dim=0) for name, part in given.items()} if times > 1 else given


def load_net(settings: Model, path: str | Path, build: Callable[[Model], nn.Module]) -> nn.Module:
    """The net of `path`: "tiny" (built by `build`), a folder that a run left, or a diffusers pipeline (folder or hub id).

    Raises ConfigError with the likely reason if it cannot be loaded.
    """
    if str(path) == "tiny":
        net = build(settings)
    elif (kept := Path(path) / "config.json").is_file():
        from core.policy.tiny_flow import TinyFlow

        kind = json.loads(kept.read_text()).get("_class_name")
        if kind != TinyFlow.__name__:
            raise ConfigError(f"MODEL={path} holds a {kind}; a flow policy is a diffusers pipeline or a TinyFlow")
        net = TinyFlow.load(Path(path), settings)
    else:
        from core.policy.pipelines import PipelineNet

        net = PipelineNet.load(str(path), settings)
    return net.to("cuda" if torch.cuda.is_available() else "cpu")
