"""The receiving end of `memserve.pool.remote`: an instance's pool at the service of others.

Contract: every request gets exactly one answer, at once or, for a pull, when its copy has ended. A
refused request has changed nothing: a destination that it named stays leased. Blocks allocated for
others are held under leases; `expire` frees those that nobody has renewed, unless a copy into them
is under way. Of the pulls so many at a time may hold memory; the others wait their turn and hold
nothing, so that no flood of them can take the pool from the requests that run here. A pull may be
cancelled at any moment: nothing is held for it from the end of its copy on.

Runs on the thread that owns the pool; the copies run wherever `StartPull` puts them. No torch here.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from memserve.errors import OutOfBlocks, PoolError, StaleReference
from memserve.pool.mempool import MemPool
from memserve.pool.refs import BlockRef, Kind, Tier
from memserve.pool.remote import (
    Allocate,
    Blocks,
    Cancel,
    Export,
    Free,
    History,
    PoolReply,
    PoolRequest,
    Prefix,
    Pull,
    Refused,
    Renew,
)

logger = logging.getLogger(__name__)

MAX_PULLS = 4
"""Most pulls that hold memory at a time: the one that is copied, and those right behind it."""

Answer = Callable[[int, PoolReply], None]
"""Answers the call of this number."""
StartPull = Callable[[int, list[BlockRef], list[int], Tier], None]
"""Copy (number, references, into these blocks of the arena of this tier); `pulled` hears the end,
later: never before the call that starts it has returned."""

Deliver = Callable[[bytes, list[BlockRef]], None]
"""A transfer has arrived: its caller's `private` data, and the blocks that hold what it brought."""


@dataclass(slots=True)
class _Lease:
    call: int
    """The caller's number of the call that it answers."""
    deadline: float


@dataclass(slots=True)
class _Copy:
    request: Pull
    known: list[int]
    """Blocks of the prefix that were cached here, held."""
    new: list[int]
    """Blocks that are written, held."""
    cancelled: bool = False


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
        max_pulls: int = MAX_PULLS,
    ) -> None:
        self._pool = pool
        self._answer = answer
        self._start_pull = start_pull
        self._deliver = deliver
        self._max_pulls = max_pulls
        self._leases: dict[int, _Lease] = {}  # by block
        self._waiting: deque[tuple[int, Pull]] = deque()
        self._copies: dict[int, _Copy] = {}
        self.num_expired = 0
        self.num_failed_pulls = 0
        self.num_late = 0
        """Copies that ended when their caller had gone, or their destination was given up."""
        self.num_pulled_blocks = 0
        self.num_returned_blocks = 0
        """Of those, copied to be cached here rather than leased."""

    def __len__(self) -> int:
        """Leased blocks, and pulls that wait or are under way."""
        return len(self._leases) + len(self._waiting) + len(self._copies)

    @property
    def blocks(self) -> list[int]:
        """All blocks that are held for others, as often as they are."""
        copied = [block for copy in self._copies.values() for block in copy.known + copy.new]
        return [*self._leases, *copied]

    @property
    def in_flight(self) -> list[int]:
        """The blocks that copies are writing."""
        return [block for copy in self._copies.values() for block in copy.new]

    def handle(self, number: int, request: PoolRequest, now: float) -> None:
        """Answer call `number`, now or when its copy has ended."""
        if isinstance(request, Pull):
            self._waiting.append((number, request))
        else:
            self._reply(number, partial(self._perform, request, now))
        self._start_pulls(now)

    def pulled(self, number: int, verified: list[bool], now: float) -> None:
        """The copy of call `number` has ended."""
        copy = self._copies.pop(number)
        self._reply(number, partial(self._end, copy, verified, now))
        self._start_pulls(now)

    def expire(self, now: float) -> None:
        """Free what was leased and not renewed in time."""
        if not self._leases:
            return
        written = set(self.in_flight)
        expired = [
            block
            for block, lease in self._leases.items()
            if now >= lease.deadline and block not in written
        ]
        if expired:
            logger.warning("%d blocks leased to others were not renewed: freed", len(expired))
            self.num_expired += len(expired)
            self._end_leases(expired)

    def _reply(self, number: int, perform: Callable[[], PoolReply | None]) -> None:
        """Answer with what `perform` returns, if it does, or with its refusal."""
        try:
            reply = perform()
        except PoolError as error:
            reply = Refused(str(error), type(error).__name__)
        if reply is not None:
            self._answer(number, reply)

    def _perform(self, request: Allocate | Free | Renew | Cancel | Export, now: float) -> PoolReply:
        match request:
            case Allocate(num_blocks, kind, lease_s, call):
                blocks = self._pool.alloc_mem(num_blocks, kind)
                return Blocks(self._lease(blocks, call, now + lease_s))
            case Free(refs):
                self._end_leases(self._leased([*dict.fromkeys(refs)]))
            case Renew(refs, lease_s):
                for block in self._leased(refs):
                    self._leases[block].deadline = now + lease_s
            case Cancel(call):
                self._cancel(call)
            case Export(num_blocks):
                return History(
                    [
                        Prefix(salt, tokens, self._pool.refs(blocks))
                        for salt, tokens, blocks in self._pool.history(num_blocks)
                    ]
                )
        return Blocks([])

    def _cancel(self, call: int) -> None:
        for number, request in [*self._waiting]:
            if request.call == call:
                self._waiting.remove((number, request))
                self._answer(number, _cancelled())
        for copy in self._copies.values():
            copy.cancelled |= copy.request.call == call
        self._end_leases([block for block, lease in self._leases.items() if lease.call == call])

    def _start_pulls(self, now: float) -> None:
        while self._waiting and len(self._copies) < self._max_pulls:
            number, request = self._waiting.popleft()
            self._reply(number, partial(self._begin, number, request, now))

    def _begin(self, number: int, request: Pull, now: float) -> PoolReply | None:
        """Start to copy what is lacking here; the answer if that is nothing."""
        tier, named = self._destination(request)
        known: list[int] = []
        if request.tokens is not None:
            # What continues a prefix in DRAM lies there too: into HBM the whole prefix is copied.
            with self._pool.match(request.tokens, request.salt, deepest=tier) as match:
                known = match.blocks[: len(request.source)]
                self._pool.retain(known)
        num_new = len(request.source) - len(known)
        try:
            if named is None:
                new = self._pool.alloc_mem(num_new, Kind[tier.name])
            else:
                new = named[:num_new]
                self._pool.retain(new)
        except OutOfBlocks:
            self._pool.free_mem(known)
            raise
        self._pool.begin_io(new)
        copy = _Copy(request, known, new)
        if not new:
            return self._end(copy, [], now)
        self._copies[number] = copy
        places = [self._pool.place(block) for block in new]
        self._start_pull(number, request.source[len(known) :], places, tier)
        return None

    def _end(self, copy: _Copy, verified: list[bool], now: float) -> PoolReply:
        """Keep what has arrived as the caller wants it, and let go of the rest."""
        self._pool.end_io(copy.new)
        num_good = (*verified, False).index(False)
        self.num_pulled_blocks += num_good
        self.num_failed_pulls += num_good < len(copy.new)
        try:
            if copy.cancelled:
                self.num_late += 1
                return _cancelled()
            reply = self._keep(copy, copy.known + copy.new[:num_good], num_good, now)
        finally:
            self._pool.free_mem(copy.known + copy.new)
        private = copy.request.private
        if private and self._deliver is not None:
            self._deliver(private, reply.refs)
        return reply

    def _keep(self, copy: _Copy, blocks: list[int], num_copied: int, now: float) -> Blocks:
        """Cache or lease the blocks that have arrived."""
        request = copy.request
        if request.tokens is not None:
            cached = self._pool.refs(self._pool.insert(request.tokens, blocks, request.salt))
            self.num_returned_blocks += num_copied
            self._end_leases(self._leased(request.destination or []))
            return Blocks(cached)
        if len(blocks) < len(request.source):
            raise StaleReference("a source lost its content before it was read")
        deadline = now + request.lease_s
        if request.destination is None:
            self._pool.retain(blocks)
            return Blocks(self._lease(blocks, request.call, deadline))
        if len(self._leased(request.destination)) < len(blocks):
            self.num_late += 1
            raise StaleReference("a destination was freed while it was written")
        for block in blocks:
            self._leases[block].deadline = deadline
        return Blocks(self._pool.refs(blocks))

    def _destination(self, request: Pull) -> tuple[Tier, list[int] | None]:
        """The tier to copy into, and the leased blocks there if the request names them."""
        if request.destination is None:
            if request.kind is Kind.MIXED:
                return self._tier_with_room(request), None
            return (Tier.HBM if request.kind is Kind.HBM else Tier.DRAM), None
        named = self._leased(request.destination)
        if len(named) != len(request.destination):
            raise StaleReference("a destination is not leased any more")
        if not set(named).isdisjoint(self.in_flight):
            raise PoolError("another transfer is writing to a destination")
        tiers = {self._pool.tier_of(block) for block in named}
        if len(set(named)) != len(request.source) or len(named) != len(request.source):
            raise PoolError("a transfer needs one block for each of its sources")
        if len(tiers) > 1:
            raise PoolError("the destinations of a transfer lie on one tier")
        return (tiers or {Tier.HBM}).pop(), named

    def _tier_with_room(self, request: Pull) -> Tier:
        """HBM if it has what lacks free; but DRAM for what continues a prefix there.

        A pull stays on one tier, and never drops history of HBM for what may lie in DRAM.
        """
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

    def _lease(self, blocks: list[int], call: int, deadline: float) -> list[BlockRef]:
        for block in blocks:
            self._leases[block] = _Lease(call, deadline)
        return self._pool.refs(blocks)

    def _leased(self, refs: list[BlockRef]) -> list[int]:
        """Blocks of those references whose lease still runs."""
        current = dict(zip(self._pool.refs([*self._leases]), self._leases, strict=True))
        return [current[ref] for ref in refs if ref in current]

    def _end_leases(self, blocks: list[int]) -> None:
        for block in blocks:
            del self._leases[block]
        self._pool.free_mem(blocks)


def _cancelled() -> Refused:
    return Refused("its caller has cancelled it", PoolError.__name__)
