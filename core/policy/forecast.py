"""Forecast policies: one decision is the value of one variable in one cell at one lead.

A step net (core/policy/step_nets.py) and a distribution (core/policy/distributions.py) take the frames of a forecast one lead
further. What is fed back, the mean of s or the s of what was sampled, is a frame that nobody saw: seen = 0. `advance` is the one
transition, of rollouts, evaluations and the supervised start alike.

Fed back the mean, frames do not depend on what a rollout draws: a group is G draws from the same distributions, and the net runs
once for all of it. No gradient flows through time: frames are those of the policy that sampled, in later updates too, so ratios
are exact. (Through the memory of a recurrent net it does flow; `forward` begins again at the first lead.)

    history h0 h1 | frames s1 s2 s3 ...        decisions of lead l:  t = ((l V + v) Y + y) X + x
    lead 0 sees h0 h1,  lead 1 sees h1 s1,  lead 2 sees s1 s2,  ...  each with what is known of its valid time

The chance of a rollout is a function of its condition's seed alone, not of ranks or batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from core.app import Shape
from core.config import ConfigError
from core.objective.composition import GIVES
from core.policy import distributions
from core.policy.distributions import Distribution
from core.policy.trajectory import Decisions, Trajectory, TrajectoryModule, joined, slices

if TYPE_CHECKING:
    from core.app import Quantity
    from core.config import ForecastRollout

MEMBERS = 8  # of a completion
AHEAD = ("ahead", "maps_ahead")
GIVEN = ("frames", "seen", "given", *AHEAD)  # what a net sees, by its names in a trajectory's state

Given = dict[str, Tensor]  # first dimension: rows; see `encode`


class ForecastPolicy(TrajectoryModule):
    """A step net with the way it is sampled; see the module docstring.

    half: compute steps in bfloat16, in rollouts and in `forward` alike; distributions are float32.
    Raises ConfigError for more classes than bins.
    """

    provides = GIVES["forecast"]

    def __init__(self, net: nn.Module, rollout: ForecastRollout, quantity: Quantity, half: bool = False):
        super().__init__(net, rollout, half)
        self.quantity = quantity
        self.family = distributions.family(rollout, quantity).to(self._device)
        self._compared = False  # with a reference

    @classmethod
    def shape(cls, condition: Mapping[str, np.ndarray], rollout: ForecastRollout, quantity: Quantity) -> Shape:
        """Of the step net that conditions like this one need."""
        steps, variables, rows, columns = condition["history"].shape
        maps = condition.get("maps_ahead")
        inputs = 2 * steps * variables + len(condition["given"]) + condition["ahead"].shape[1]
        inputs += 0 if maps is None else maps.shape[1]
        return Shape(inputs, distributions.family(rollout, quantity).outputs, rows, columns)

    def leads(self, batch: int) -> int:
        """Of a rollout of a generation batch: it grows by one every `leads_every` batches."""
        settings = self.settings
        if not settings.leads_every:
            return settings.leads
        return min(settings.leads, settings.first_leads + batch // settings.leads_every)

    @property
    def units(self) -> int:
        return self.settings.leads

    # -- one step -------------------------------------------------------------------------------------------------------

    def encode(self, conditions: Sequence[Mapping[str, np.ndarray]]) -> Given:
        """N conditions (core.app.Forecast) on the net's device, without `valid`.

        "frames" (N, H, V, Y, X): the history in s; "seen" (N, H, V, Y, X), "given" (N, C, Y, X), "ahead" (N, L, D) and maybe
        "maps_ahead" (N, L, F, Y, X) as they come. Raises ValueError for a number that is not finite: it would spread over
        every cell that a net sees from there.
        """
        names = {"frames": "history", "seen": "seen", "given": "given", "ahead": "ahead"}
        if "maps_ahead" in conditions[0]:
            names["maps_ahead"] = "maps_ahead"
        at, given = self._device, {}
        for ours, theirs in names.items():
            stacked = np.stack([condition[theirs] for condition in conditions]).astype(np.float32, copy=False)
            if bad := int((~np.isfinite(stacked)).sum()):
                raise ValueError(
                    f"{bad} numbers in {theirs!r} of {len(conditions)} conditions are not finite; fill them before"
                )
            given[ours] = torch.from_numpy(stacked).to(at)
        return given | {"frames": self.family.scale.inward(given["frames"])}

    def view(self, given: Given, lead: int) -> Tensor:
        """What the net sees at a lead, (N, inputs, Y, X).

        Channels: frames (h, v), oldest first; seen (h, v); given; ahead, everywhere the same; maps_ahead.
        """
        cells = given["frames"].shape[-2:]
        ahead = given["ahead"][:, lead, :, None, None]
        frames, seen = (given[name].flatten(1, 2) for name in ("frames", "seen"))
        parts = [frames, seen, given["given"], ahead.expand(-1, -1, *cells)]
        if "maps_ahead" in given:
            parts.append(given["maps_ahead"][:, lead])
        return torch.cat(parts, dim=1)

    def step(self, net: nn.Module, x: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """The net's output, float32, and its memory."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            output, memory = net.step(x, memory)
        if output.shape[1] != self.family.outputs:
            raise ConfigError(
                f"the net gives {output.shape[1]} channels and rollout.distribution={self.settings.distribution} reads "
                f"{self.family.outputs}; set distribution, decide, bins and rank as in the run that made the net"
            )
        return output.float(), memory

    def distribution(
        self, given: Given, lead: int, memory: Any = None, valid: Tensor | None = None
    ) -> tuple[Distribution, Any]:
        """Of the frames at `lead`, and the net's memory. valid: (N, V, Y, X)."""
        output, memory = self.step(self.net, self.view(given, lead), memory)
        return self.family(output, given["frames"][:, -1], valid), memory

    @staticmethod
    def advance(given: Given, frame: Tensor) -> Given:
        """One lead later: `frame` (N, V, Y, X), in s, is the newest, and nobody saw it."""
        frame = frame.detach().unsqueeze(1)
        frames = torch.cat([given["frames"][:, 1:], frame], dim=1)
        seen = torch.cat([given["seen"][:, 1:], torch.zeros_like(frame)], dim=1)
        return given | {"frames": frames, "seen": seen}

    def unroll(self, given: Given, leads: int) -> Iterator[Distribution]:
        """The distributions of each lead, with gradient but none through time; the mean is fed back."""
        memory = None
        for lead in range(leads):
            frames, memory = self.distribution(given, lead, memory)
            yield frames
            if lead + 1 < leads:
                given = self.advance(given, frames.state())

    # -- acting ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(
        self,
        conditions: Sequence[Mapping[str, np.ndarray]],
        group_size: int,
        seeds: Sequence[int],
        *,
        batch: int = 0,
        batch_size: int | None = None,
        asks: frozenset[str] = frozenset(),
    ) -> Trajectory:
        """See TrajectoryModule. Outputs are float32 (L, V, Y, X); a block of decisions is the condition's "segments", or a lead.

        Raises ValueError for more leads than the conditions know of.
        """
        leads = self.leads(batch)
        given, noise = self.encode(conditions), self._noise(conditions, group_size, seeds, leads)
        valid = torch.from_numpy(np.stack([c["valid"][:leads] for c in conditions]).astype(np.float32)).to(self._device)
        given = {name: part[:, :leads] if name in AHEAD else part for name, part in given.items()} | {"valid": valid}
        if "segments" in conditions[0]:
            blocks = torch.from_numpy(np.stack([c["segments"][:leads] for c in conditions])).to(self._device)
        else:
            blocks = torch.arange(leads, device=self._device).view(1, -1, 1, 1, 1).expand(valid.shape)
        if self.settings.feedback == "sample":  # then every rollout has frames of its own
            given = {name: part.repeat_interleave(group_size, dim=0) for name, part in given.items()}
            noise = noise.flatten(0, 1).unsqueeze(1)
        made = [
            self._act({name: part[rows] for name, part in given.items()}, noise[rows], rows.start)
            for rows in slices(len(noise), batch_size)
        ]
        trajectory = joined(made)
        trajectory.segments = blocks.flatten(1).repeat_interleave(group_size, dim=0)
        return trajectory

    @property
    def _device(self) -> torch.device:
        return next(self.net.parameters(), torch.empty(0)).device

    def _noise(self, conditions: Sequence[Mapping], group_size: int, seeds: Sequence[int], leads: int) -> Tensor:
        """(N, G, leads, ...): the first leads of a longer forecast draw the same."""
        self._refuse_beyond(conditions, leads)
        cells, drawn = conditions[0]["history"].shape[1:], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.stack([self.family.noise(group_size, cells, generator) for _ in range(leads)], dim=1))
        return torch.stack(drawn).to(self._device)

    @staticmethod
    def _refuse_beyond(conditions: Sequence[Mapping], leads: int) -> None:
        if leads > (known := len(conditions[0]["ahead"])):
            raise ValueError(f"{leads} leads are more than the {known} that the conditions know of; ask for fewer")

    def _act(self, given: Given, noise: Tensor, number: int) -> Trajectory:
        """Rollouts of some rows, noise (N, G, L, ...) of each; the first row is condition `number` of all."""
        (count, draws, leads), memory, kept, start = noise.shape[:3], None, [], given
        frames, valid = [given["frames"]], given["valid"]
        for lead in range(leads):
            ahead, memory = self.distribution(given, lead, memory, valid[:, lead])
            actions = ahead.sample(noise[:, :, lead].transpose(0, 1))
            kept.append((actions, ahead.log_prob(actions)))
            fed = ahead.state() if self.settings.feedback == "mean" else self.family.states(actions[0])
            given = self.advance(given, fed)
            frames.append(given["frames"][:, -1:])
        actions, logps = (torch.stack(part, dim=2).transpose(0, 1).flatten(0, 1) for part in zip(*kept, strict=True))
        state = {name: start[name] for name in GIVEN if name in start} | {"frames": torch.cat(frames[:-1], dim=1)}
        state = {name: part.repeat_interleave(draws, dim=0) for name, part in state.items()}
        state["condition"] = torch.arange(number, number + count, device=logps.device).repeat_interleave(draws)
        mask = valid.flatten(1).repeat_interleave(draws, dim=0)
        outputs = list(self.family.values(actions).cpu().numpy())
        unit = valid[0, 0].numel()
        return Trajectory(logps.flatten(1), mask, state | {"actions": actions}, outputs, unit=unit)

    @torch.no_grad()
    def forecast(
        self, conditions: Sequence[Mapping[str, np.ndarray]], leads: int, batch_size: int | None = None
    ) -> list[np.ndarray]:
        """One completion a condition, (leads, V, Y, X) of `completion_dtype`; with averaged weights if there are. No chance.

        value: the mean. level: the class announced (`settings.decide`): the most likely one, of equals the lowest, by the
        forecast or by a head of its own, or that of the mean. exceed: probability of each class edge. members: quantiles.
        """
        self._refuse_beyond(conditions, leads)
        edges, levels = self.quantity.edges, (np.arange(MEMBERS) + 0.5) / MEMBERS
        bounds, made = torch.tensor(edges, device=self._device), []
        with self.averaged():
            for rows in slices(len(conditions), batch_size):
                given = self.encode(conditions[rows])
                shape = (len(given["frames"]), leads, *given["frames"].shape[2:])
                fields = np.empty(shape, completion_dtype(len(edges[0])))
                for lead, ahead in enumerate(self.unroll(given, leads)):
                    value, exceed = ahead.mean(), ahead.exceedance(edges)
                    if self.settings.decide == "head":
                        level = ahead.announced()
                    elif self.settings.decide == "class":
                        level = distributions.classes_of(exceed).argmax(dim=2)
                    else:
                        level = (value.unsqueeze(2) >= bounds[:, :, None, None]).sum(2)
                    members = ahead.quantiles(levels).movedim(1, -1)
                    parts = {"value": value, "level": level, "exceed": exceed.movedim(2, -1), "members": members}
                    for name, part in parts.items():
                        fields[name][:, lead] = part.cpu().numpy()
                made += list(fields)
        return made

    @torch.no_grad()
    def sample_forecasts(
        self, conditions: Sequence[Mapping[str, np.ndarray]], seeds: Sequence[int], leads: int
    ) -> list[np.ndarray]:
        """One sampled completion a condition, float32 (leads, V, Y, X), the mean fed back; with averaged weights if there are."""
        with self.averaged():
            given, noise = self.encode(conditions), self._noise(conditions, 1, seeds, leads)
            drawn = [
                self.family.values(ahead.sample(noise[:, 0, lead]))
                for lead, ahead in enumerate(self.unroll(given, leads))
            ]
        return list(torch.stack(drawn, dim=1).cpu().numpy())

    def keep_reference(self) -> None:
        super().keep_reference()
        self._compared = True

    # -- weighing what was done -------------------------------------------------------------------------------------------

    def forward(self, trajectory: Trajectory, steps: slice = slice(None)) -> Decisions:
        """The decisions `steps` of every row under the weights of now: one pass of the net, of each distinct condition once."""
        state, unit = trajectory.state, trajectory.unit
        first, stop, _ = steps.indices(trajectory.logps.shape[1])
        leads = range(first // unit, -(-stop // unit))
        _, condition, sizes = state["condition"].unique_consecutive(return_inverse=True, return_counts=True)
        starts = sizes.cumsum(0) - sizes
        place = torch.arange(len(condition), device=condition.device) - starts[condition]
        valid = trajectory.mask.view(-1, *state["actions"].shape[1:])[starts]
        given = {name: state[name][starts] for name in GIVEN if name in state}
        reference = None
        if self._compared:
            with torch.no_grad(), self.reference() as net:
                reference = self._frames(net, given, leads, valid)
        own = self._frames(self.net, given, leads, valid)
        # Draws of one condition side by side, (G, leads * N, V, Y, X); a condition with fewer than others repeats its first.
        draws = torch.arange(int(sizes.max()), device=sizes.device).unsqueeze(1)
        draws = starts + torch.where(draws < sizes, draws, 0)
        actions = state["actions"][:, leads.start : leads.stop][draws].transpose(1, 2).flatten(1, 2)

        def of_rows(values: Tensor) -> Tensor:
            """(leads * N, V, Y, X) of conditions -> (B, t) of rows."""
            return values.unflatten(0, (len(leads), -1)).transpose(0, 1)[condition].flatten(1)[:, part]

        part = slice(first - leads.start * unit, stop - leads.start * unit)
        logps = own.log_prob(actions).unflatten(1, (len(leads), -1)).transpose(1, 2)[place, condition]
        extras = {"divergence": of_rows(own.kl(reference))} if reference else {}
        return Decisions(logps.flatten(1)[:, part], entropy=of_rows(own.entropy()), extras=extras)

    def _frames(self, net: nn.Module, given: Given, leads: range, valid: Tensor) -> Distribution:
        """The distributions of some leads, (leads * N, ...), from the frames that were fed to each of them.

        A recurrent net begins at the first lead; any other takes all of them at once.
        """
        steps = given["seen"].shape[1]
        seen = torch.cat([given["seen"], torch.zeros_like(given["frames"][:, steps:])], dim=1)
        recurrent = getattr(net, "recurrent", False)
        views = []
        for lead in range(0 if recurrent else leads.start, leads.stop):
            now = slice(lead, lead + steps)
            views.append(self.view(given | {"frames": given["frames"][:, now], "seen": seen[:, now]}, lead))
        if recurrent:
            outputs, memory = [], None
            for x in views:
                output, memory = self.step(net, x, memory)
                outputs.append(output)
            output = torch.cat(outputs[leads.start :])
        else:
            output, _ = self.step(net, torch.cat(views))
        last = given["frames"][:, steps - 1 :][:, leads.start : leads.stop].transpose(0, 1).flatten(0, 1)
        return self.family(output, last, valid[:, leads.start : leads.stop].transpose(0, 1).flatten(0, 1))


def completion_dtype(edges: int) -> np.dtype:
    """Of a cell: its value; the announced level; P(x >= edge) of each edge; equally likely members, ascending."""
    return np.dtype([("value", "f4"), ("level", "i1"), ("exceed", "f2", (edges,)), ("members", "f2", (MEMBERS,))])
