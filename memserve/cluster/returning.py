"""Decoded KV on its way back to the instance that prefilled the request (PD-Caching-3, the paper's §5).

When an answer generated elsewhere is complete, its prefill instance pulls the whole blocks that it
lacks, at once and in the background: the next turn of the conversation finds them there. Copies run
on the receiver's copy thread, into what is free of HBM or else into DRAM, and where there is no DRAM
in the place of the coldest history: neither prefill nor decode waits. A return that fails costs a
later turn some time, never an answer; until one has succeeded, the scheduler sees where the blocks
are and may have them fetched.
"""

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from memserve.cluster.streams import Stream
from memserve.errors import ChannelClosed, PoolError, StaleReference
from memserve.generation import Recoveries
from memserve.pool.refs import Kind
from memserve.pool.remote import RemotePool
from memserve.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_UNDER_WAY = 64  # to one instance; those beyond are left to be fetched when they are needed


class Returns:
    """Starts a return for each request that ends where it was not prefilled."""

    def __init__(
        self,
        pool: RemotePool,
        scheduler: Scheduler,
        in_background: Callable[[Coroutine[Any, Any, None]], object],
        *,
        block_size: int,
        enabled: bool,
        counts: Recoveries,
    ) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._in_background = in_background
        self._block_size = block_size
        self._enabled = enabled
        self._under_way: Counter[int] = Counter()  # by receiving instance
        self.num_done = 0
        self._counts = counts

    @property
    def num_under_way(self) -> int:
        """Returns that have been started and have not ended."""
        return self._under_way.total()

    def ended(self, stream: Stream) -> None:
        """A request is over: bring back what its prefill instance lacks of it."""
        reuse = stream.placement.reuse_prefill and stream.placement.reuse_decode
        decoded_elsewhere = stream.owner is not stream.prefill and len(stream.answer) > 1
        if not self._enabled or not reuse or not decoded_elsewhere or stream.prefill.leaving:
            return
        receiver = stream.prefill.number
        if self._under_way[receiver] >= MAX_UNDER_WAY:
            self._counts.num_failed_returns += 1
            return
        self._under_way[receiver] += 1
        self._in_background(self._return(stream))

    async def _return(self, stream: Stream) -> None:
        try:
            if not stream.finished:  # it was aborted: wait until its blocks are in the index
                await self._pool.settled(stream.owner.number)
            await self._pull(stream)
        except (PoolError, ChannelClosed) as error:
            self._counts.num_failed_returns += 1
            logger.debug("ticket %d: its answer's KV did not come back: %s", stream.ticket, error)
        finally:
            self._under_way[stream.prefill.number] -= 1

    async def _pull(self, stream: Stream) -> None:
        receiver, salt = stream.prefill.number, stream.generation.cache_salt
        # The last token was sampled and never computed: it has no KV.
        tokens = stream.generation.prompt + array("i", stream.answer[:-1])
        refs = self._scheduler.locate(stream.owner.number, tokens, salt)
        if len(refs) <= len(self._scheduler.locate(receiver, tokens, salt)):
            return
        tokens = tokens[: len(refs) * self._block_size]
        pull = self._pool.transfer_with_insert(receiver, tokens, refs, kind=Kind.MIXED, salt=salt)
        if len(cached := await pull) < len(refs):
            raise StaleReference(f"only {len(cached)} of {len(refs)} blocks could be read")
        self.num_done += 1
