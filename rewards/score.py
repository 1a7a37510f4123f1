"""What a reward returns: a value, a reason code and a detail; and marks: what a call sees, and when an answer holds.

Four cases, never mixed: a bad completion has a low value and a reason; a reward that does not apply to a row has value
None (only that component is left out); a check that could not judge has value FAILED (the whole rollout is unscored);
a broken data row raises BrokenRow. Standard library only.

A completion of many decisions of which each has a value of its own (the cells of a forecast) may be given them all, as a
numpy array, by a `batched` reward alone: other rewards answer through lines of text.

A scorer keeps answers and gives them again to the same completion and columns (core/cache.py). It need not be told of
files that a column names; everything else that moves an answer is said here: `repeatable`, `volatile`, `reads`.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FAILED = math.nan


@dataclass(frozen=True, slots=True)
class Score:
    """One component of one completion.

    value: float in [0, 1]; None = does not apply to this row; FAILED (NaN) = the check could not judge. Or an array of
        such, one for each decision of the completion in C order, equally many for every completion of a batch; there NaN
        = does not apply at this decision, and an array of nothing else = None.
    reason: a short code fit for counting (`wrong_rows`). detail: one line for a reader, never counted.
    repeatable: False = the same call might say something else another time, because a clock or chance decided this one.
    weight: how many cases a value is the mean of; means over rows weigh by it, so that they are the rate of all cases.
    """

    value: "float | np.ndarray | None"
    reason: str = ""
    detail: str = ""
    repeatable: bool = True
    weight: float = 1.0

    @property
    def failed(self) -> bool:
        """True where the check could not judge."""
        return isinstance(self.value, numbers.Real) and math.isnan(self.value)


class BrokenRow(ValueError):
    """The data row itself is wrong (its gold does not run); the caller adds the row's id."""

    broken_row = True


def per_group(reward: Callable) -> Callable:
    """Mark a reward as called once per group: `reward(completions, *, columns of the group's row) -> list[Score]`."""
    reward.scope = "group"
    return reward


def batched(reward: Callable) -> Callable:
    """Mark a reward as called once per batch, in process: `reward(completions, *, lists of columns) -> list[Score]`."""
    reward.scope = "batch"
    return reward


def volatile(reward: Callable) -> Callable:
    """Mark a reward none of whose answers is repeatable: a judge that samples, a reward that looks at the clock."""
    reward.volatile = True
    return reward


def reads(paths: Callable[[Mapping[str, Any]], Iterable[str | PathLike]]) -> Callable[[Callable], Callable]:
    """Mark a reward whose answers hold only while certain files do not change: `paths(columns)` lists them.

    A file that a text column names need not be listed. A file that is not there yet may be.
    """

    def mark(reward: Callable) -> Callable:
        reward.reads = paths
        return reward

    return mark
