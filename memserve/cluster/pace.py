"""How fast requests leave, to tell those that find no place when to come back."""

from typing import final

WEIGHT = 0.05  # of the newest gap between two that leave
MIN_S, MAX_S = 1.0, 60.0


@final
class Pace:
    """A moving mean of the time between two requests that leave the server."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._gap = 0.0  # seconds; 0: unknown

    def left(self, now: float) -> None:
        """A request has left, however it ended."""
        if self._last is not None:
            gap = now - self._last
            self._gap = gap if self._gap == 0.0 else self._gap + WEIGHT * (gap - self._gap)
        self._last = now

    def wait(self, num_requests: int) -> float:
        """Seconds in which about a tenth of so many requests leaves, within reason.

        Who comes back then finds a place even if others come too.
        """
        return min(max(self._gap * num_requests / 10, MIN_S), MAX_S)
