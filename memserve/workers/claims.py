"""Who holds blocks, by ticket, so that an old claim can take from a young one.

Everything that holds blocks of the pool on behalf of a request stands here with a way to make it give
them up: running sequences, prompts waiting to be handed over, room reserved for incoming ones. One
rule then keeps the pool from deadlock: the oldest ticket can always get what it needs.
"""

from collections.abc import Callable

from memserve.errors import OutOfBlocks
from memserve.pool.mempool import MemPool
from memserve.workers.swapping import Swapper


class Claims:
    """Allocates blocks for tickets, taking them from younger tickets when the pool is exhausted."""

    def __init__(self, pool: MemPool, swapper: Swapper) -> None:
        self._pool = pool
        self._swapper = swapper
        self._give_up_by_ticket: dict[int, Callable[[], None]] = {}
        self._let_go_by_ticket: dict[int, Callable[[], None]] = {}  # the oldest first

    def hold(self, ticket: int, give_up: Callable[[], None]) -> None:
        """Record that a ticket holds blocks; `give_up` must free them and call `drop`."""
        self._give_up_by_ticket[ticket] = give_up

    def drop(self, ticket: int) -> None:
        """Record that a ticket holds no blocks any more."""
        self._give_up_by_ticket.pop(ticket, None)
        self._let_go_by_ticket.pop(ticket, None)

    def keep(self, ticket: int, let_go: Callable[[], None]) -> None:
        """Record that what a ticket holds is history, for whoever needs room; as `hold` otherwise."""
        self._let_go_by_ticket[ticket] = let_go

    def allocate_spare(self, num_blocks: int) -> list[int]:
        """Blocks that no running request holds; raises OutOfBlocks."""
        while True:
            try:
                return self._pool.alloc_mem(num_blocks)
            except OutOfBlocks:
                if not self._let_go_by_ticket:
                    raise
                next(iter(self._let_go_by_ticket.values()))()

    def allocate(self, num_blocks: int, *, above: int) -> list[int] | None:
        """Blocks from the pool, or else from tickets younger than `above`, the youngest first.

        None when that isn't enough now: older tickets hold the blocks, or those that a younger one
        gave up are being copied to DRAM or still written to, to be free at one of the next steps.
        """
        swapper = self._swapper
        while True:
            try:
                return self.allocate_spare(num_blocks)
            except OutOfBlocks:
                if self._pool.num_free + swapper.num_coming + swapper.num_landing >= num_blocks:
                    return None
                youngest = max(self._give_up_by_ticket, default=above)
                if youngest <= above:
                    return None
                self._give_up_by_ticket[youngest]()
                if self._swapper.make_room(num_blocks):
                    return None
