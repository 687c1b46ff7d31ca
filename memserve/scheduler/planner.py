"""Elastic roles: what the split of the traffic (`layout_model`) makes of each instance.

One thing decides: where the traffic is best served by instances for prefill alone, those are prefill
and the others decode; where it isn't, all are mixed. A decision must have stood for a while before
roles follow it, and there is a pause after each change. Without traffic nothing is known, so nothing
changes; nor does a role that was set by hand, until there is another decision.

A split leaves at least one instance on each side. Members that come or go make a new decision.
"""

from memserve.scheduler.interface import Role
from memserve.scheduler.loads import Loads

PATIENCE = 3.0
"""Seconds for which a decision must have stood."""

PAUSE = 5.0
"""Seconds between changes."""


class RolePlanner:
    """Remembers what was decided last, and for how long the split has said otherwise."""

    def __init__(self) -> None:
        self._decided: dict[int, Role] = {}
        self._wanted: dict[int, Role] = {}
        self._since = self._changed_at = -PAUSE

    def plan(self, loads: Loads, now: float, *, known: bool) -> list[tuple[int, Role]]:
        """The changes to make now; `known` says whether there is traffic to decide by."""
        wanted = _wanted(loads) if known else self._decided
        if wanted != self._wanted:
            self._wanted, self._since = wanted, now
        if wanted == self._decided or now < max(self._since + PATIENCE, self._changed_at + PAUSE):
            return []
        self._decided, self._changed_at = wanted, now
        return [
            (number, role) for number, role in wanted.items() if loads.roles[number] is not role
        ]


def _wanted(loads: Loads) -> dict[int, Role]:
    """The roles of all that serve, by the split."""
    rows = loads.rows[loads.rows["serves"]]
    if not rows["special"].any():
        return {int(number): Role.MIXED for number in rows["instance"]}
    return {int(row["instance"]): Role.PREFILL if row["special"] else Role.DECODE for row in rows}
