"""Who gets in: what could never be served is an error at once, what can't be now is turned away.

Requests are counted by their choices, since each is work of its own, and by their prompts' tokens,
once for each choice: few long prompts fill a queue as well as many short ones. A request that is
larger than a bound all by itself still gets in when the server is empty: it would never, otherwise.
"""

import time
from typing import final

from memserve.cluster.capacity import Capacity
from memserve.cluster.pace import MAX_S, MIN_S, Pace
from memserve.errors import InvalidRequest, Overloaded
from memserve.generation import Generation
from memserve.scheduler.interface import Late


@final
class Admission:
    """Counts what is in the server against its bounds; whoever enters must leave."""

    def __init__(self, max_num_choices: int, max_num_tokens: int) -> None:
        self._max_num_choices = max_num_choices
        self._max_num_tokens = max_num_tokens
        self._inside: set[str] = set()
        """The requests' ids."""
        self._num_choices = 0
        self._num_tokens = 0
        self._pace = Pace()

    def check(self, generation: Generation, capacity: Capacity) -> None:
        """Raise `Overloaded` if there is no room for it now, `InvalidRequest` if there never is."""
        if generation.request_id in self._inside:
            raise InvalidRequest(f"request id {generation.request_id!r} is in use")
        capacity.check(len(generation.prompt), generation.sampling.max_tokens)
        self._check_bounds(generation)

    def _check_bounds(self, generation: Generation) -> None:
        if not self._inside:
            return
        if self._num_choices + generation.num_choices > self._max_num_choices:
            full, code = f"{self._num_choices} requests", "num_requests"
        elif self._num_tokens + _num_tokens(generation) > self._max_num_tokens:
            full, code = f"requests with {self._num_tokens} prompt tokens", "num_tokens"
        else:
            return
        raise Overloaded(
            f"{full} are queued already; try again later",
            code=code,
            retry_after=self._pace.wait(len(self._inside)),
        )

    def check_objective(self, late: Late | None) -> None:
        """Raise `Overloaded` for who would break an objective; None: no-one."""
        if late is None:
            return
        if late.objective == "slo_ttft":
            problem = "the first token would come too late: too many prompts are queued"
        else:
            problem = "tokens would come too slowly: too many requests run"
        raise Overloaded(
            f"{problem}; try again later",
            code=late.objective,
            retry_after=min(max(late.seconds, MIN_S), MAX_S),
        )

    def enter(self, generation: Generation) -> None:
        """Count a request."""
        self._inside.add(generation.request_id)
        self._num_choices += generation.num_choices
        self._num_tokens += _num_tokens(generation)

    def leave(self, generation: Generation) -> None:
        """A request that was counted has left, however it ended."""
        self._inside.remove(generation.request_id)
        self._num_choices -= generation.num_choices
        self._num_tokens -= _num_tokens(generation)
        self._pace.left(time.monotonic())


def _num_tokens(generation: Generation) -> int:
    return len(generation.prompt) * generation.num_choices
