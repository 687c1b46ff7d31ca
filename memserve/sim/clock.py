"""Virtual time: what is to happen, in the order of its time; equal times in the order they were asked.

Contract: `now` never goes back. Nothing here sleeps.
"""

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """Actions by the virtual second at which they are due."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._due: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()

    def at(self, time: float, action: Action) -> None:
        """Do something at `time`, which must not have passed."""
        assert time >= self.now, f"{time} has passed; it is {self.now}"
        heapq.heappush(self._due, (time, next(self._numbers), action))

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Go on until nothing is due any more, or `until` says so."""
        while self._due and not until():
            self.now, _, action = heapq.heappop(self._due)
            self.num_events += 1
            action()
