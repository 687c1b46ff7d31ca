"""Notices that a copy thread has stopped making progress, so that nobody waits for it any longer.

A copy may take long, and stand behind many others; that none of them ends for `patience` seconds means
that the disk, or whatever it is, hangs. Then what would be brought is computed instead, until an end
is heard of. Knows no copies, only that they are under way.
"""

import logging
from typing import final

logger = logging.getLogger(__name__)

STALL_S = 10.0


@final
class Progress:
    """The copies of one thread, called `name` in the log; `patience` in seconds."""

    def __init__(self, name: str, *, patience: float) -> None:
        self._name = name
        self._patience = patience
        self._under_way: set[object] = set()
        self._has_moved = True
        self._since = 0.0
        self.stalled = False
        """Whether nothing has ended for too long."""

    def begun(self, copy: object) -> None:
        """A copy was asked for."""
        self._has_moved |= not self._under_way
        self._under_way.add(copy)

    def ended(self, copy: object) -> None:
        """A copy has ended, well or not; one that is not known here says nothing."""
        if copy not in self._under_way:
            return
        self._under_way.remove(copy)
        self._has_moved = True
        if self.stalled:
            logger.warning("%s go on", self._name)
        self.stalled = False

    def tend(self, now: float) -> None:
        """Look at the clock, in seconds; called once a step."""
        if self._has_moved or not self._under_way:
            self._has_moved, self._since = False, now
        elif not self.stalled and now - self._since >= self._patience:
            logger.warning("%s have not moved for %g s: not waited for", self._name, self._patience)
            self.stalled = True
