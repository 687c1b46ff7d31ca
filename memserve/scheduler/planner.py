"""Elastic roles: which instance should change sides as the mix of load changes.

Both sides are compared in the same unit, the seconds of delay that a request meets there: the wait
before a prefill, and the time that decoding among others takes longer than decoding alone. When one
side has been worse by far for a while, an instance of the other side begins to share its work;
where all share already, one gives up the work of the side that has less of it.

One change at a time, with a pause after each. Nobody is ever the last to leave a side.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.scheduler.interface import Role
from memserve.scheduler.loads import Loads

RATIO = 2.0
"""One side must be so many times worse than the other."""

LEAST_DELAY = 0.5
"""Seconds of delay that are worth a change."""

PATIENCE = 3.0
"""Seconds for which it must have been so."""

PAUSE = 5.0
"""Seconds between changes."""

Floats = NDArray[np.float64]


@dataclass(slots=True)
class _Trend:
    worse: str = ""
    since: float = 0.0


class RolePlanner:
    """Remembers how long a side has been the worse one."""

    def __init__(self) -> None:
        self._trend = _Trend()
        self._changed_at = -PAUSE

    def plan(
        self, loads: Loads, wait: Floats, crowding: Floats, now: float
    ) -> list[tuple[int, Role]]:
        """The change to make now, if any.

        `wait` and `crowding` are seconds of delay in prefill and in decoding, by slot.
        """
        rows = loads.rows
        prefill = _mean(wait, rows["prefills"])
        decode = _mean(crowding, rows["decodes"])
        worse = ""
        if max(prefill, decode) >= LEAST_DELAY:
            if prefill > RATIO * decode:
                worse = "prefill"
            elif decode > RATIO * prefill:
                worse = "decode"
        if worse != self._trend.worse:
            self._trend = _Trend(worse, now)
        if not worse or now - self._trend.since < PATIENCE or now - self._changed_at < PAUSE:
            return []
        change = self._change(loads, wait, crowding, worse)
        if change is None:
            return []
        self._changed_at = self._trend.since = now
        return [change]

    def _change(
        self, loads: Loads, wait: Floats, crowding: Floats, worse: str
    ) -> tuple[int, Role] | None:
        """Let the least busy of the other side help; else let one of those who share specialise."""
        rows = loads.rows
        if worse == "prefill":
            helpers, other = rows["serves"] & ~rows["prefills"], rows["decodes"]
            busy, special = crowding, Role.PREFILL
        else:
            helpers, other = rows["serves"] & ~rows["decodes"], rows["prefills"]
            busy, special = wait, Role.DECODE
        if helpers.any():
            return int(rows["instance"][_least(busy, helpers)]), Role.MIXED
        shared = rows["prefills"] & rows["decodes"]
        if not shared.any() or np.count_nonzero(other) < 2:
            return None
        return int(rows["instance"][_least(busy, shared)]), special


def _mean(delays: Floats, members: NDArray[np.bool_]) -> float:
    return float(delays[members].mean()) if members.any() else 0.0


def _least(busy: Floats, allowed: NDArray[np.bool_]) -> int:
    return int(np.argmin(np.where(allowed, busy, np.inf)))
