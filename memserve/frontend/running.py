"""The requests that are being answered: how long each may take, and how all of them end.

Every completion is answered inside `Running.until`, which interrupts it when its time is over or
when the server must go: what it holds (its generations) is let go of as the contexts inside unwind,
and its client is told by the error that comes out. Once `drain` has begun nothing new gets in.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import final

from memserve.errors import DeadlineExceeded, Overloaded


@final
class Running:
    """The requests of one app that are being answered."""

    def __init__(self) -> None:
        self._clocks: set[asyncio.Timeout] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False
        self._cut = False

    def __len__(self) -> int:
        return len(self._clocks)

    @property
    def draining(self) -> bool:
        """Whether the server takes no new requests because it is about to leave."""
        return self._draining

    def check_open(self) -> None:
        """Raise `Overloaded` when the server takes no new requests."""
        if self._draining:
            raise self._leaving()

    @asynccontextmanager
    async def until(self, deadline: float | None) -> AsyncIterator[None]:
        """Be a running request until `deadline` (the event loop's time; None: for ever).

        Raises `Overloaded` on entering when the server is about to leave, and on leaving when it
        could wait no longer; `DeadlineExceeded` when the time was over.
        """
        self.check_open()
        clock = asyncio.timeout_at(deadline)
        try:
            async with clock:
                self._clocks.add(clock)
                self._empty.clear()
                try:
                    yield
                finally:
                    self._clocks.discard(clock)
                    if not self._clocks:
                        self._empty.set()
        except TimeoutError:
            if not clock.expired():
                raise
            if self._cut:
                raise self._leaving() from None
            raise DeadlineExceeded(
                "The request took longer than it may.", code="deadline_exceeded"
            ) from None

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Take nothing new; return when all are answered, interrupting what is left after a time.

        They get so many `seconds`, and no longer than until `hurry` is set.
        """
        self._draining = True
        waits = [asyncio.create_task(event.wait()) for event in (self._empty, hurry)]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._cut = True
        now = asyncio.get_running_loop().time()
        for clock in self._clocks:
            if not clock.expired():
                clock.reschedule(now)
        await self._empty.wait()

    def _leaving(self) -> Overloaded:
        return Overloaded("the server is shutting down", code="shutting_down")
