"""What one micro-batch of the loss sees: rows, already shuffled; never a whole group, never a neighbour.

Everything a reduction needs to know about the rest of the update is in `Counts`, so that micro-batches and ranks merge.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count), detached; adds up over micro-batches and ranks


@dataclass
class Counts:
    """Of an update (every micro-batch, every rank): kept rows, kept decisions with mask 1; T's upper limit.

    Where several updates share a generation batch: the batch's, divided by their number, so that every decision of the
    batch weighs the same, in whichever update it lands.
    """

    rows: float | Tensor
    tokens: float | Tensor
    max_length: int


@dataclass
class Rows:
    """B rows of at most T decisions.

    logps: (B, T) nats, with gradient. mask: (B, T), 1 on decisions that carry loss. advantage: (B,) or (B, T).
    counts: of the update. old_logps: (B, T) under the policy that sampled; None = `logps.detach()`.
    ref_logps: (B, T) under the reference policy. keep: (B,) in {0, 1}, 0 = out of loss and counts; None = all 1.
    group_id: (B,) int. entropy: (B, T) nats; with gradient if it is to be regularized.
    weight: (B, T) or (B, 1), multiplies the surrogate but no regularizer (sampler's importance ratio, off-policy mask).
    lengths: (B,), decisions with mask 1 of the whole row, where T is only a chunk of them; None = T is all there are.
    extras: tensors that a recipe asked for in `needs` or that its credit returned.
    Raises ValueError for shapes that do not fit.
    """

    logps: Tensor
    mask: Tensor
    advantage: Tensor
    counts: Counts
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    keep: Tensor | None = None
    group_id: Tensor | None = None
    entropy: Tensor | None = None
    weight: Tensor | None = None
    lengths: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, decisions = self.logps.shape
        full, single, column = (rows, decisions), (rows,), (rows, 1)
        allowed = {
            "mask": (full,), "advantage": (single, full), "old_logps": (full,), "ref_logps": (full,), "keep": (single,),
            "group_id": (single,), "entropy": (full,), "weight": (full, column), "lengths": (single,),
        }  # fmt: skip
        for name, shapes in allowed.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) not in shapes:
                expected = " or ".join(map(str, shapes))
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected} beside logps {full}")

    @property
    def loss_mask(self) -> Tensor:
        """(B, T): 1 on decisions that carry loss in rows that are kept."""
        return self.mask if self.keep is None else self.mask * self.keep.to(self.mask.dtype).unsqueeze(1)

    @property
    def advantages(self) -> Tensor:
        """(B, 1) or (B, T): the advantage, ready to multiply (B, T)."""
        return self.advantage.unsqueeze(1) if self.advantage.dim() == 1 else self.advantage

    @cached_property
    def log_ratio(self) -> Tensor:
        """(B, T): logps - old_logps."""
        return self.logps - (self.logps.detach() if self.old_logps is None else self.old_logps)

    @cached_property
    def token_ratio(self) -> Tensor:
        """(B, T): exp(log_ratio), one ratio per decision. Source: arXiv 2402.03300; read in TRL 1.16's code."""
        return torch.exp(self.log_ratio)

    @cached_property
    def sequence_ratio(self) -> Tensor:
        """(B, 1): the geometric mean of a row's token ratios over the mask; 1 for an empty row.

        Source: arXiv 2507.18071; read in TRL 1.16's code (importance_sampling_level="sequence").
        """
        mask = self.loss_mask
        return torch.exp(((self.log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1))

    def extra(self, name: str) -> Tensor:
        """One of `extras`. Raises ValueError if the trainer did not hand it on."""
        if name not in self.extras:
            raise ValueError(
                f"rows have no extra {name!r}, which this loss looks at (extras: {', '.join(self.extras)})"
            )
        return self.extras[name]

    def per_decision(self, name: str, elsewhere: float = 0.0) -> Tensor:
        """(B, T) or (B, T, D): one of `extras`, and `elsewhere` where no loss is carried."""
        values, used = self.extra(name), self.loss_mask.bool()
        return torch.where(used.view(*used.shape, *[1] * (values.dim() - 2)), values, elsewhere)

    def settled(self) -> Rows:
        """The same rows with `old_logps` filled in and zeros where no loss is carried.

        Without the zeros a NaN or an overflow in padding, in an unobserved cell or in a dropped row would become
        0 * NaN = NaN in the masked sum; sums over the mask keep their bits.
        """
        used = self.loss_mask.bool()
        old = self.logps.detach() if self.old_logps is None else self.old_logps

        def zeroed(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return torch.where(used if values.shape == used.shape else used.any(dim=1, keepdim=True), values, 0.0)

        return replace(
            self,
            logps=zeroed(self.logps),
            old_logps=zeroed(old),
            ref_logps=zeroed(self.ref_logps),
            entropy=zeroed(self.entropy),
            weight=zeroed(self.weight),
        )

    def masked_mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count), float32, detached: of (B, T) values over decisions with loss, of (B, 1) over kept rows."""
        if values.shape == self.mask.shape:  # also where T = 1
            weight = self.loss_mask
        else:
            weight = torch.ones_like(values) if self.keep is None else self.keep.unsqueeze(1)
        return (values.detach() * weight).sum().float(), weight.sum().float()


@dataclass
class Loss:
    """A reduced loss that has not been divided yet, so that it merges.

    local=False: the update's loss is the total of `sum` over all micro-batches and ranks, divided by `count`, which is
    the same everywhere. A trainer whose ranks average gradients scales sum / count by the number of ranks.
    local=True (kept for parity with TRL): the mean of sum / count over micro-batches of rows; it depends on the split.
    """

    sum: Tensor
    count: Tensor
    metrics: Metrics = field(default_factory=dict)
    local: bool = False
