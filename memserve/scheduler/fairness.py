"""The order in which waiting prompts start: start-time fair queueing over tenants, then priority.

Each tenant (a session where no tenant is named) has a tag, the virtual time at which its last
request's work ends if all tenants are served alike. A request is ordered by the later of that tag
and the virtual time now. Priority shifts the order by a bounded amount of work; since newcomers are
ordered by a virtual time that goes on, everyone's turn comes.
"""

PRIORITY_SECONDS = 2.0
"""Work that one step of priority is worth."""

MAX_PRIORITY = 20
MAX_FLOWS = 4096
"""Tags that are kept. Beyond that the half that would hold its tenants back least is dropped."""


class FairOrder:
    """Tags by tenant. Work is counted in seconds."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def start(self, flow: str) -> float:
        """The virtual time at which this flow's next request may start."""
        return max(self._now, self._ends.get(flow, 0.0))

    def order(self, flow: str, priority: int) -> float:
        """Its place in a queue, the lower the earlier."""
        bounded = max(-MAX_PRIORITY, min(MAX_PRIORITY, priority))
        return self.start(flow) + bounded * PRIORITY_SECONDS

    def charge(self, flow: str, work: float) -> float:
        """A request of this flow was sent; returns its start."""
        start = self.start(flow)
        self._ends[flow] = start + work
        if len(self._ends) > MAX_FLOWS:
            latest = sorted(self._ends.items(), key=lambda tag: tag[1])[MAX_FLOWS // 2 :]
            self._ends = {flow: end for flow, end in latest if end > self._now}
        return start

    def served(self, start: float) -> None:
        """A request that was to start at this virtual time has been served."""
        self._now = max(self._now, start)
