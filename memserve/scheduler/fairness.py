"""The order in which waiting prompts start: start-time fair queueing over tenants, then priority.

Each tenant (a session where no tenant is named) has a tag, the virtual time at which its last
request's work ends if all tenants are served alike. A request is ordered by the later of that tag
and the virtual time now. Virtual time goes on with the work that is served, shared by the tenants
that have requests waiting; so newcomers are ordered later and later, and everyone's turn comes, also
where tenants that never came before never end. Priority shifts the order by a bounded amount of work.
"""

from dataclasses import dataclass

PRIORITY_SECONDS = 2.0
"""Work that one step of priority is worth."""

MAX_PRIORITY = 20
MAX_FLOWS = 4096
"""Tags that are kept. Beyond that the half that would hold its tenants back least is dropped."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request's place in virtual time."""

    flow: str
    start: float
    work: float


class FairOrder:
    """Tags by tenant. Work is counted in seconds."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}
        self._num_waiting: dict[str, int] = {}

    def start(self, flow: str) -> float:
        """The virtual time at which this flow's next request may start."""
        return max(self._now, self._ends.get(flow, 0.0))

    def order(self, flow: str, priority: int) -> float:
        """Its place in a queue, the lower the earlier."""
        bounded = max(-MAX_PRIORITY, min(MAX_PRIORITY, priority))
        return self.start(flow) + bounded * PRIORITY_SECONDS

    def charge(self, flow: str, work: float) -> Turn:
        """A request of this flow was sent; it waits until `served` or `withdrawn`."""
        turn = Turn(flow, self.start(flow), work)
        self._num_waiting[flow] = self._num_waiting.get(flow, 0) + 1
        self._ends[flow] = turn.start + work
        if len(self._ends) > MAX_FLOWS:
            latest = sorted(self._ends.items(), key=lambda tag: tag[1])[MAX_FLOWS // 2 :]
            self._ends = {flow: end for flow, end in latest if end > self._now}
        return turn

    def served(self, turn: Turn) -> None:
        """A request's turn has come."""
        self._now = max(self._now + turn.work / len(self._num_waiting), turn.start)
        self.withdrawn(turn)

    def withdrawn(self, turn: Turn) -> None:
        """A request waits no more, and was not served."""
        self._num_waiting[turn.flow] -= 1
        if not self._num_waiting[turn.flow]:
            del self._num_waiting[turn.flow]
