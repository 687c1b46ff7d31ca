"""The inbox of an engine, into which it may look during a step without taking anything out of turn."""

import queue
from collections import deque
from collections.abc import Callable
from typing import final

from memserve.workers.link import Event


@final
class Mailbox:
    """Events in the order in which they came; for one reading thread."""

    def __init__(self, inbox: "queue.SimpleQueue[Event]") -> None:
        self._inbox = inbox
        self._seen: deque[Event] = deque()

    def empty(self) -> bool:
        """Whether nothing waits to be taken."""
        return not self._seen and self._inbox.empty()

    def get(self, timeout: float | None = None) -> Event:
        """Take the oldest event; waits for one. Raises `queue.Empty` after `timeout` seconds."""
        return self._seen.popleft() if self._seen else self._inbox.get(timeout=timeout)

    def glance(self, matters: Callable[[Event], bool]) -> bool:
        """Whether one of the events that came since the last look matters; all stay here."""
        new = []
        while not self._inbox.empty():
            new.append(self._inbox.get())
        self._seen.extend(new)
        return any(matters(event) for event in new)
