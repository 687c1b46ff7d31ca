"""Who gets in: the bounds on what may be in the server at once.

Requests are counted by their choices, since each is work of its own, and by their prompts' tokens,
once for each choice: few long prompts fill a queue as well as many short ones. A request that is
larger than a bound all by itself still gets in when the server is empty: it would never, otherwise.
"""

import time
from typing import final

from memserve.cluster.pace import Pace
from memserve.errors import Overloaded
from memserve.generation import Generation


@final
class Admission:
    """Counts what is in the server against its bounds; whoever enters must leave."""

    def __init__(self, max_num_choices: int, max_num_tokens: int) -> None:
        self._max_num_choices = max_num_choices
        self._max_num_tokens = max_num_tokens
        self._num_requests = 0
        self._num_choices = 0
        self._num_tokens = 0
        self._pace = Pace()

    def check(self, generation: Generation) -> None:
        """Raise `Overloaded` if there is no room for it now."""
        if not self._num_requests:
            return
        if self._num_choices + generation.num_choices > self._max_num_choices:
            full = f"{self._num_choices} requests"
        elif self._num_tokens + _num_tokens(generation) > self._max_num_tokens:
            full = f"requests with {self._num_tokens} prompt tokens"
        else:
            return
        raise Overloaded(
            f"{full} are queued already; try again later",
            retry_after=self._pace.wait(self._num_requests),
        )

    def enter(self, generation: Generation) -> None:
        """Count a request."""
        self._num_requests += 1
        self._num_choices += generation.num_choices
        self._num_tokens += _num_tokens(generation)

    def leave(self, generation: Generation) -> None:
        """A request that was counted has left, however it ended."""
        self._num_requests -= 1
        self._num_choices -= generation.num_choices
        self._num_tokens -= _num_tokens(generation)
        self._pace.left(time.monotonic())


def _num_tokens(generation: Generation) -> int:
    return len(generation.prompt) * generation.num_choices
