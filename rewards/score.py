"""What a reward returns: a value, a reason code and a detail; and the marks that say what a reward is called with.

Four cases, never mixed: a bad completion has a low value and a reason; a reward that does not apply to a row has value
None (only that component is left out); a check that could not judge has value FAILED (the whole rollout is unscored);
a broken data row raises BrokenRow. Standard library only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

FAILED = math.nan


@dataclass(frozen=True, slots=True)
class Score:
    """One component of one completion.

    value: float in [0, 1]; None = does not apply to this row; FAILED (NaN) = the check could not judge.
    reason: a short code fit for counting (`wrong_rows`). detail: one line for a reader, never counted.
    """

    value: float | None
    reason: str = ""
    detail: str = ""

    @property
    def failed(self) -> bool:
        """True where the check could not judge."""
        return self.value is not None and math.isnan(self.value)


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
