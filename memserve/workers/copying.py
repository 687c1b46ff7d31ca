"""The copy thread: pulls blocks out of other arenas while the engine computes.

One thread, one copy after another, in the order asked. Blocks are marked as in flight before a copy
is asked for, and unmarked when its end (`CopyDone`, `SwapDone`) arrives at the inbox, whatever became
of the request. What is pulled from another instance is kept by its owner until the handover is
settled (a lease), or withdrawn, which changes its generation.
"""

import logging
import queue
from concurrent.futures import ThreadPoolExecutor

from memserve.errors import PoolError
from memserve.pool.pending import Swap
from memserve.pool.refs import BlockRef
from memserve.pool.transfer.memfd import MemfdTransfer
from memserve.pool.transfer.tiers import TierCopy
from memserve.workers.link import CopyDone, Event, SwapDone

logger = logging.getLogger(__name__)


class Copier:
    """Runs pulls and swaps on one background thread and reports each to the inbox."""

    def __init__(
        self, transfer: MemfdTransfer, tiers: TierCopy | None, inbox: "queue.SimpleQueue[Event]"
    ) -> None:
        self._transfer = transfer
        self._tiers = tiers
        self._inbox = inbox
        self._thread = ThreadPoolExecutor(1, "memserve-copy")

    def start(self, ticket: int, indexes: list[int], refs: list[BlockRef], into: list[int]) -> None:
        """Copy `refs` into the local blocks `into`; ends in exactly one `CopyDone`."""
        self._thread.submit(self._copy, ticket, indexes, refs, into)

    def start_swap(self, swap: Swap) -> None:
        """Copy a swap's blocks; ends in exactly one `SwapDone`."""
        self._thread.submit(self._swap, swap)

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

    def _swap(self, swap: Swap) -> None:
        assert self._tiers is not None
        sources, destinations = swap.places
        self._tiers.copy(sources, destinations, swap.to)
        self._inbox.put(SwapDone(swap))
