"""The worker's I/O thread: frames in and out while the engine computes.

The engine loop and everything that happens beside it meet at one queue, `Link.inbox`: messages from
the launcher, ends of copies (put there by the copy thread), and `Hangup` when the launcher has gone.
"""

import asyncio
import logging
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from memserve.channel import Channel
from memserve.errors import ChannelClosed
from memserve.messages import ToWorker
from memserve.pool.pending import Swap
from memserve.workers.fetching import Fetch, FileRead

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hangup:
    """The launcher's end of the channel is closed."""


@dataclass(frozen=True, slots=True)
class CopyDone:
    """A copy has ended, well or not: `verified[i]` tells about `indexes[i]`."""

    ticket: int
    indexes: list[int]
    """Numbers of the blocks within the sequence."""
    into: list[int]
    """The arena blocks that were written."""
    verified: list[bool]


@dataclass(frozen=True, slots=True)
class PullDone:
    """The copy that a pool call asked for has ended."""

    number: int
    verified: list[bool]


@dataclass(frozen=True, slots=True)
class SwapDone:
    """The copy of a swap has ended."""

    swap: Swap


@dataclass(frozen=True, slots=True)
class FetchDone:
    """A copy to a waiting sequence has ended: its first `num_good` blocks are what was asked for."""

    fetch: Fetch | FileRead
    num_good: int


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """The copy thread has met an error of our own; nobody knows what its copy has done."""

    error: BaseException


Event: TypeAlias = ToWorker | CopyDone | PullDone | SwapDone | FetchDone | CopyFailed | Hangup


class Link:
    """Runs the channel on its own thread; `send` and `inbox` are safe to use from the engine loop."""

    def __init__(self, control: socket.socket) -> None:
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.receive: Callable[[ToWorker], None] = self.inbox.put
        """Takes each message on the thread that reads them."""
        self._control = control
        self._loop = asyncio.new_event_loop()
        self._channel: Channel[ToWorker] | None = None
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memserve-io", daemon=True)

    def start(self) -> None:
        """Open the channel; returns when messages can be sent."""
        self._thread.start()
        self._opened.wait()

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; when the launcher has gone, `Hangup` is in the inbox instead."""
        with suppress(RuntimeError):  # the thread has ended, and its loop with it
            self._loop.call_soon_threadsafe(self._send, message)

    def close(self) -> None:
        """Flush what was sent and end the thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._close()))
        self._thread.join(timeout=5)

    def _send(self, message: msgspec.Struct) -> None:
        assert self._channel is not None
        if not self._channel.closing:
            self._channel.send(message)

    async def _close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._read())
        except ChannelClosed as error:
            logger.error("nothing more is read: %s", error)  # noqa: TRY400 - no fault of this side
        finally:
            try:
                self._end_tasks()
            finally:
                self._loop.close()
                self.inbox.put(Hangup())
                self._opened.set()  # nobody waits for a channel that could not be opened

    def _end_tasks(self) -> None:
        """What was begun while the last message was read: a call of `close` may have come then."""
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks))

    async def _read(self) -> None:
        self._channel = await Channel.open(self._control, ToWorker)
        self._opened.set()
        try:
            async for batch in self._channel.batches():
                for message in batch:
                    self.receive(message)
        finally:  # whichever end has closed it, the socket is closed before the loop is
            await self._channel.close()
