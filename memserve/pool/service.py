"""The receiving end of `memserve.pool.remote`: an instance's pool at the service of others.

Contract: every request gets exactly one answer, at once or, for a pull, when its copy has ended. A
refused request has changed nothing. Blocks allocated for others are held under leases; `expire` frees
those that nobody has renewed, unless a copy into them is under way. Runs on the thread that owns the
pool; the copies run wherever `StartPull` puts them. No torch here.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from memserve.errors import OutOfBlocks, PoolError, StaleReference
from memserve.pool.mempool import MemPool
from memserve.pool.refs import BlockRef, Tier
from memserve.pool.remote import (
    Allocate,
    Blocks,
    Export,
    Free,
    History,
    Kind,
    PoolReply,
    PoolRequest,
    Prefix,
    Pull,
    Refused,
    Renew,
)

logger = logging.getLogger(__name__)

Answer = Callable[[int, PoolReply], None]
"""Answers the call of this number."""
StartPull = Callable[[int, list[BlockRef], list[int], Tier], None]
"""Copy (number, references, into these blocks of the arena of this tier); `pulled` hears the end."""

Deliver = Callable[[bytes, list[BlockRef]], None]
"""A transfer has arrived: its caller's `private` data, and the blocks that hold what it brought."""


@dataclass(frozen=True, slots=True)
class _Copy:
    request: Pull
    known: list[int]
    """Blocks of the prefix that were cached here, held."""
    new: list[int]
    """Blocks that are written, held."""


class PoolService:
    """Answers other instances' calls of one pool.

    `deliver` hears of every transfer that brings private data, once its blocks are there and before
    its caller does; without it nobody here asks for that data.
    """

    def __init__(
        self,
        pool: MemPool,
        answer: Answer,
        start_pull: StartPull,
        *,
        deliver: Deliver | None = None,
    ) -> None:
        self._pool = pool
        self._answer = answer
        self._start_pull = start_pull
        self._deliver = deliver
        self._deadlines: dict[int, float] = {}  # by leased block
        self._copies: dict[int, _Copy] = {}
        self.num_expired = 0
        self.num_pulled_blocks = 0
        self.num_returned_blocks = 0
        """Of those, copied to be cached here rather than leased."""

    def __len__(self) -> int:
        """Leased blocks and copies under way."""
        return len(self._deadlines) + len(self._copies)

    @property
    def blocks(self) -> list[int]:
        """All blocks that are held for others."""
        copied = [block for copy in self._copies.values() for block in copy.known + copy.new]
        return [*self._deadlines, *copied]

    def handle(self, number: int, request: PoolRequest, now: float) -> None:
        """Answer call `number`, now or when its copy has ended."""
        try:
            reply = self._perform(number, request, now)
        except PoolError as error:
            reply = Refused(str(error), type(error).__name__)
        if reply is not None:
            self._answer(number, reply)

    def pulled(self, number: int, verified: list[bool], now: float) -> None:
        """The copy of call `number` has ended."""
        copy = self._copies.pop(number)
        self._pool.end_io(copy.new)
        num_good = (*verified, False).index(False)
        self.num_pulled_blocks += num_good
        if copy.request.tokens is not None:
            self.num_returned_blocks += num_good
        blocks = copy.known + copy.new[:num_good]
        try:
            reply = self._keep(copy, blocks, now)
        except PoolError as error:
            reply = Refused(str(error), type(error).__name__)
        self._pool.free_mem(copy.known + copy.new)
        private = copy.request.private
        if private and self._deliver is not None and isinstance(reply, Blocks):
            self._deliver(private, reply.refs)
        self._answer(number, reply)

    def _keep(self, copy: _Copy, blocks: list[int], now: float) -> PoolReply:
        """Cache or lease the blocks that have arrived."""
        request = copy.request
        if request.tokens is not None:
            cached = self._pool.insert(request.tokens, blocks, request.salt)
            return Blocks(self._pool.refs(cached))
        if len(blocks) < len(request.source):
            raise StaleReference("a source lost its content before it was read")
        self._pool.retain(blocks)
        return Blocks(self._lease(blocks, now + request.lease_s))

    def expire(self, now: float) -> None:
        """Free what was leased and not renewed in time."""
        expired = [block for block, deadline in self._deadlines.items() if now >= deadline]
        if expired:
            logger.warning("%d blocks leased to others were not renewed: freed", len(expired))
            self.num_expired += len(expired)
            self._end_leases(expired)

    def _perform(self, number: int, request: PoolRequest, now: float) -> PoolReply | None:
        match request:
            case Allocate(num_blocks, kind, lease_s):
                return Blocks(self._lease(self._allocate(num_blocks, kind), now + lease_s))
            case Free(refs):
                self._end_leases(self._leased(refs))
                return Blocks([])
            case Renew(refs, lease_s):
                self._deadlines.update(dict.fromkeys(self._leased(refs), now + lease_s))
                return Blocks([])
            case Export(num_blocks):
                return History(
                    [
                        Prefix(salt, tokens, self._pool.refs(blocks))
                        for salt, tokens, blocks in self._pool.history(num_blocks)
                    ]
                )
            case Pull():
                self._pull(number, request, now)
                return None

    def _pull(self, number: int, request: Pull, now: float) -> None:
        """Start a copy of what is lacking here."""
        tier, named = self._destination(request)
        known: list[int] = []
        if request.tokens is not None:
            # What continues a prefix in DRAM lies there too: into HBM the whole prefix is copied.
            with self._pool.match(request.tokens, request.salt, deepest=tier) as match:
                known = match.blocks[: len(request.source)]
                self._pool.retain(known)
        num_new = len(request.source) - len(known)
        try:
            new = self._pool.alloc_mem(num_new, tier) if named is None else named[:num_new]
        except OutOfBlocks:
            self._pool.free_mem(known)
            raise
        if named is not None:
            self._pool.free_mem(named[num_new:])
            for block in named:
                del self._deadlines[block]
        self._pool.begin_io(new)
        self._copies[number] = _Copy(request, known, new)
        if new:
            places = [self._pool.place(block) for block in new]
            self._start_pull(number, request.source[len(known) :], places, tier)
        else:
            self.pulled(number, [], now)

    def _destination(self, request: Pull) -> tuple[Tier, list[int] | None]:
        """The tier to copy into, and the leased blocks there if the request names them."""
        if request.destination is None:
            if request.kind is Kind.MIXED:
                return self._tier_with_room(request), None
            return (Tier.HBM if request.kind is Kind.HBM else Tier.DRAM), None
        named = self._leased(request.destination)
        if len(named) != len(request.destination):
            raise StaleReference("a destination is not leased any more")
        tiers = {self._pool.tier_of(block) for block in named}
        if len(named) != len(request.source) or len(tiers) != 1:
            raise PoolError("a transfer needs one block of one tier for each of its sources")
        return tiers.pop(), named

    def _tier_with_room(self, request: Pull) -> Tier:
        """HBM if it has what lacks free; but DRAM for what continues a prefix there."""
        if not self._pool.has_dram:
            return Tier.HBM
        num_known = 0
        if request.tokens is not None:
            with self._pool.match(request.tokens, request.salt) as match:
                if match.num_hbm < len(match.blocks):
                    return Tier.DRAM
                num_known = len(match.blocks)
        fits = self._pool.num_free >= len(request.source) - num_known
        return Tier.HBM if fits else Tier.DRAM

    def _allocate(self, num_blocks: int, kind: Kind) -> list[int]:
        num_hbm = 0 if kind is Kind.DRAM else num_blocks
        if kind is Kind.MIXED and self._pool.has_dram:
            num_hbm = min(self._pool.num_free, num_blocks)
        blocks = self._pool.alloc_mem(num_hbm)
        try:
            return blocks + self._pool.alloc_mem(num_blocks - num_hbm, Tier.DRAM)
        except OutOfBlocks:
            self._pool.free_mem(blocks)
            raise

    def _lease(self, blocks: list[int], deadline: float) -> list[BlockRef]:
        self._deadlines.update(dict.fromkeys(blocks, deadline))
        return self._pool.refs(blocks)

    def _leased(self, refs: list[BlockRef]) -> list[int]:
        """Blocks of those references whose lease still runs."""
        current = dict(zip(self._pool.refs([*self._deadlines]), self._deadlines, strict=True))
        return [current[ref] for ref in refs if ref in current]

    def _end_leases(self, blocks: list[int]) -> None:
        for block in blocks:
            del self._deadlines[block]
        self._pool.free_mem(blocks)
