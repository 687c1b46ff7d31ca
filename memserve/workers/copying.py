"""The copy thread: pulls blocks out of other arenas while the engine computes.

One thread, one copy after another, in the order asked. Blocks are marked as in flight before a copy
is asked for, and unmarked when its end (`CopyDone`, `PullDone`, `SwapDone`, `FetchDone`) arrives at
the inbox, whatever became of the request. What is handed over is kept by its owner until the handover
is settled (a lease), or withdrawn, which changes its generation; what is fetched is kept by nobody,
and verified all the same. An error of our own ends in `CopyFailed`, never in silence.
"""

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from operator import attrgetter

from memserve.errors import PoolError
from memserve.messages import CopySample
from memserve.pool.pending import Swap
from memserve.pool.refs import BlockRef, Tier
from memserve.pool.transfer.memfd import MemfdTransfer
from memserve.pool.transfer.tiers import TierCopy
from memserve.workers.fetching import Fetch
from memserve.workers.link import CopyDone, CopyFailed, Event, FetchDone, PullDone, SwapDone
from memserve.workers.samples import Samples

logger = logging.getLogger(__name__)

BY_ARENA = attrgetter("instance", "epoch", "tier")


class Copier:
    """Runs pulls and swaps on one background thread and reports each to the inbox."""

    def __init__(
        self,
        transfer: MemfdTransfer,
        tiers: TierCopy | None,
        inbox: "queue.SimpleQueue[Event]",
        samples: Samples,
    ) -> None:
        self._transfer = transfer
        self._tiers = tiers
        self._inbox = inbox
        self._samples = samples
        self._thread = ThreadPoolExecutor(1, "memserve-copy")

    def start(self, ticket: int, indexes: list[int], refs: list[BlockRef], into: list[int]) -> None:
        """Copy `refs` into the local blocks `into`; ends in exactly one `CopyDone`."""
        self._submit(lambda: self._copy(ticket, indexes, refs, into))

    def start_pull(self, number: int, refs: list[BlockRef], into: list[int], tier: Tier) -> None:
        """Copy `refs` into these blocks of a tier's arena for a pool call; ends in one `PullDone`."""
        self._submit(lambda: self._pull(number, refs, into, tier))

    def start_fetch(self, fetch: Fetch) -> None:
        """Copy what other instances may still hold; ends in exactly one `FetchDone`."""
        self._submit(lambda: self._fetch(fetch))

    def start_swap(self, swap: Swap) -> None:
        """Copy a swap's blocks; ends in exactly one `SwapDone`."""
        self._submit(lambda: self._swap(swap))

    def close(self) -> None:
        """Wait for the copies under way."""
        self._thread.shutdown()

    def _submit(self, work: Callable[[], None]) -> None:
        self._thread.submit(work).add_done_callback(self._report)

    def _report(self, done: "Future[None]") -> None:
        error = done.exception()
        if error is not None:
            self._inbox.put(CopyFailed(error))

    def _copy(self, ticket: int, indexes: list[int], refs: list[BlockRef], into: list[int]) -> None:
        self._inbox.put(CopyDone(ticket, indexes, into, self._read(refs, into, Tier.HBM)))

    def _pull(self, number: int, refs: list[BlockRef], into: list[int], tier: Tier) -> None:
        self._inbox.put(PullDone(number, self._read(refs, into, tier)))

    def _fetch(self, fetch: Fetch) -> None:
        """Copy one arena's blocks after the other's, up to the first that can't be had."""
        num_good = 0
        for _, group in groupby(fetch.refs, BY_ARENA):
            refs = list(group)
            into = fetch.into[num_good : num_good + len(refs)]
            good = (*self._read_now(refs, into), False).index(False)
            num_good += good
            if good < len(refs):
                break
        self._inbox.put(FetchDone(fetch, num_good))

    def _read_now(self, refs: list[BlockRef], into: list[int]) -> list[bool]:
        """Read what nobody keeps for us; without the copy that verifies, nothing can be had."""
        if self._transfer.needs_lease:
            return [False] * len(refs)
        return self._read(refs, into, Tier.HBM)

    def _read(self, refs: list[BlockRef], into: list[int], tier: Tier) -> list[bool]:
        start = time.perf_counter()
        try:
            leased = self._transfer.needs_lease
            verified = self._transfer.read(refs, into, leased=leased, tier=tier)
        except PoolError as error:
            logger.info("a pull was refused: %s", error)
            return [False] * len(refs)
        num_bytes = len(refs) * self._transfer.block_bytes
        self._samples.add_copy(CopySample(num_bytes, time.perf_counter() - start))
        return verified

    def _swap(self, swap: Swap) -> None:
        assert self._tiers is not None
        sources, destinations = swap.places
        self._tiers.copy(sources, destinations, swap.to)
        self._inbox.put(SwapDone(swap))
