"""Keeps HBM from filling up with cold history, and brings history back: both between steps.

When few blocks of HBM are free, the coldest historical ones are copied to DRAM in the background until
enough are, so that an allocation finds free blocks instead of having to drop history. Whoever needs
more than is free asks `make_room` and comes back at the next step while that is under way. When copies
hang, nobody waits for them: history is dropped instead, as without that tier.

Without a DRAM tier nothing happens here. Knows blocks, no requests.
"""

from collections.abc import Callable, Sequence

from memserve.pool.mempool import MemPool
from memserve.pool.pending import Swap
from memserve.workers.stalling import STALL_S, Progress

LOW_SHARE = 16  # free blocks fall below 1/16 of HBM: start
HIGH_SHARE = 8  # 1/8 is free: stop
MAX_BLOCKS = 64  # in one copy, so that the first of many are free soon

StartSwap = Callable[[Swap], None]
"""Copy a swap's blocks in the background; `SwapDone` tells of its end, and the engine commits it."""


class Swapper:
    """Starts the swaps of one worker's pool; the engine settles them."""

    def __init__(self, pool: MemPool, start: StartSwap, *, patience: float = STALL_S) -> None:
        self._pool = pool
        self._start_copy = start
        self.copies = Progress("copies", patience=patience)
        """Of the copy thread, as far as sequences may wait for them."""
        total = pool.stats().hbm.total
        self._low = -(-total // LOW_SHARE)
        self._high = -(-total // HIGH_SHARE)

    @property
    def num_coming(self) -> int:
        """Blocks of HBM that the swaps under way will free."""
        return 0 if self.copies.stalled else self._pool.num_leaving

    @property
    def num_landing(self) -> int:
        """Blocks of HBM that nobody keeps any more, and that copies under way will let go of."""
        return 0 if self.copies.stalled else self._pool.num_landing

    def tend(self) -> None:
        """Keep some HBM free; called once a step."""
        if self._pool.num_free < self._low and not self._pool.num_leaving:
            self._swap_out(self._high)

    def make_room(self, num_blocks: int) -> bool:
        """Whether `num_blocks` of HBM will come free by swaps that are under way or start now.

        False if they are free already, or if no history can be moved: then only dropping some helps.
        """
        if self._pool.num_free >= num_blocks:
            return False
        if not self._pool.num_leaving:
            self._swap_out(max(num_blocks, self._high))
        return self.num_coming > 0

    def load(self, blocks: Sequence[int], into: Sequence[int]) -> Swap:
        """Bring blocks from DRAM into blocks of HBM that the caller holds."""
        swap = self._pool.swap_in(blocks, into)
        self._start(swap)
        return swap

    def _start(self, swap: Swap) -> None:
        self.copies.begun(swap)
        self._start_copy(swap)

    def _swap_out(self, num_wanted: int) -> None:
        """Start to move so many blocks that `num_wanted` are free, as far as one copy goes."""
        missing = num_wanted - self._pool.num_free
        swap = self._pool.swap_out(min(missing, MAX_BLOCKS))
        if swap is not None:
            self._start(swap)
