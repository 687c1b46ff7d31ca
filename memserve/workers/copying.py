"""The copy thread: pulls blocks out of other instances' arenas while the engine computes.

One thread, one copy after another, in the order asked. The caller marks the destination blocks as
in flight before it asks and unmarks them when `CopyDone` arrives at the inbox, whatever became of
the request. What is pulled is kept by its owner until the handover is settled (a lease), or withdrawn,
which changes its generation.
"""

import logging
import queue
from concurrent.futures import ThreadPoolExecutor

from memserve.errors import PoolError
from memserve.pool.refs import BlockRef
from memserve.pool.transfer.memfd import MemfdTransfer
from memserve.workers.link import CopyDone, Event

logger = logging.getLogger(__name__)


class Copier:
    """Runs pulls on one background thread and reports each to the inbox."""

    def __init__(self, transfer: MemfdTransfer, inbox: "queue.SimpleQueue[Event]") -> None:
        self._transfer = transfer
        self._inbox = inbox
        self._thread = ThreadPoolExecutor(1, "memserve-copy")

    def start(self, ticket: int, indexes: list[int], refs: list[BlockRef], into: list[int]) -> None:
        """Copy `refs` into the local blocks `into`; ends in exactly one `CopyDone`."""
        self._thread.submit(self._copy, ticket, indexes, refs, into)

    def close(self) -> None:
        """Wait for the copies under way."""
        self._thread.shutdown()

    def _copy(self, ticket: int, indexes: list[int], refs: list[BlockRef], into: list[int]) -> None:
        try:
            verified = self._transfer.read(refs, into, leased=self._transfer.needs_lease)
        except PoolError as error:
            logger.warning("ticket %d: pull refused: %s", ticket, error)
            verified = [False] * len(refs)
        self._inbox.put(CopyDone(ticket, indexes, into, verified))
