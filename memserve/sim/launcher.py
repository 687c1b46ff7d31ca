"""What a simulated launcher takes of a request before it sends it on: one request after the other.

What it takes of tokens is in the steps that bring them (`costs.Profile`), since it takes it from the
cores that the instances share.
"""

from collections.abc import Callable
from typing import final

from memserve.sim.clock import Clock


@final
class Launcher:
    """Reads requests, `seconds` each."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.num_reading = 0
        """Requests that were sent and have not been read."""
        self._clock = clock
        self._seconds = seconds
        self._free_at = 0.0

    def read(self, then: Callable[[], None]) -> None:
        """Read one more request; `then` what is to be done with it."""
        if not self._seconds:
            then()
            return
        self.num_reading += 1
        self._free_at = max(self._free_at, self._clock.now) + self._seconds
        self._clock.at(self._free_at, lambda: self._read(then))

    def _read(self, then: Callable[[], None]) -> None:
        self.num_reading -= 1
        then()
