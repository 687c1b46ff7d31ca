"""Which blocks of an arena are free, and why the others are not: bookkeeping without tensors.

Contract: a block is kept by references (a request, an open match), by the index, or by copies and
steps in flight. It loses its content when neither a reference nor the index keeps it, and
`on_content_lost` hears of it at that moment. It returns to the free list when nothing is in flight
either. So the content of a block is always declared lost before the block can be allocated again.

    free ──allocate──▶ active ──index──▶ active and historical
     ▲                   │ release              │ release
     │                   ▼                      ▼
     └──────── (in flight only) ◀──unindex── historical (idle: neither active nor in flight)

Every call checks all its blocks before it changes one: a PoolError leaves all as it was.
Single-threaded: the engine's main loop owns it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from memserve.errors import OutOfBlocks, PoolError


class BlockAllocator:
    """Reference counts, in-flight counts, the indexed flag and the free list of one arena."""

    def __init__(self, num_blocks: int, on_content_lost: Callable[[Sequence[int]], None]) -> None:
        self.num_blocks = num_blocks
        self._on_content_lost = on_content_lost
        # Last in, first out: the block freed last is the one most likely still in the caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._in_flight = [0] * num_blocks
        self._indexed = bytearray(num_blocks)
        self.num_active = 0
        self.num_indexed = 0
        self.num_in_flight = 0
        self.num_idle = 0
        self.num_landing = 0
        """Blocks that only copies or steps keep: free as soon as those have ended."""

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free)

    def num_references(self, block: int) -> int:
        """How many holders keep this block."""
        return self._references[block]

    def num_io(self, block: int) -> int:
        """How many copies or launched steps still touch this block."""
        return self._in_flight[block]

    def is_indexed(self, block: int) -> bool:
        """Whether the index keeps this block (historical)."""
        return bool(self._indexed[block])

    def is_idle(self, block: int) -> bool:
        """Whether only the index keeps this block, so that eviction frees it at once."""
        return not self._references[block] and not self._in_flight[block] and self.is_indexed(block)

    def allocate(self, num_blocks: int) -> list[int]:
        """`num_blocks` free blocks with one reference each, or OutOfBlocks."""
        if num_blocks > len(self._free):
            raise OutOfBlocks(f"{num_blocks} blocks wanted, {len(self._free)} free")
        if num_blocks < 0:
            raise PoolError(f"can't allocate {num_blocks} blocks")
        if num_blocks == 0:
            return []
        blocks = self._free[-num_blocks:]
        del self._free[-num_blocks:]
        references = self._references
        for block in blocks:
            references[block] = 1
        self.num_active += num_blocks
        return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more reference to each of these blocks, which must hold content."""
        self.require_content(blocks)
        for block in blocks:
            if self._references[block] == 0:
                self.num_active += 1
                self.num_idle -= self._in_flight[block] == 0
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less for each entry of `blocks`."""
        self.require_references(blocks)
        references, indexed, lost = self._references, self._indexed, []
        for block in blocks:
            references[block] -= 1
            if references[block] == 0:
                self.num_active -= 1
                if not indexed[block]:
                    lost.append(block)
                elif self._in_flight[block] == 0:
                    self.num_idle += 1
        self._lose(lost)

    def index(self, blocks: Sequence[int]) -> None:
        """The index keeps these referenced blocks from now on; each at most once."""
        self.require_indexable(blocks)
        for block in blocks:
            self._indexed[block] = 1
        self.num_indexed += len(blocks)

    def unindex(self, blocks: Sequence[int]) -> None:
        """The index no longer keeps these blocks."""
        if len(set(blocks)) != len(blocks) or not all(self._indexed[b] for b in blocks):
            raise PoolError("a block that is not indexed can't leave the index")
        lost = []
        for block in blocks:
            self._indexed[block] = 0
            if self._references[block] == 0:
                self.num_idle -= self._in_flight[block] == 0
                lost.append(block)
        self.num_indexed -= len(blocks)
        self._lose(lost)

    def begin_io(self, blocks: Sequence[int]) -> None:
        """A copy or a launched step touches these blocks from now on."""
        self.require_content(blocks)
        for block in blocks:
            if self._in_flight[block] == 0:
                self.num_in_flight += 1
                self.num_idle -= self._references[block] == 0
            self._in_flight[block] += 1

    def end_io(self, blocks: Sequence[int]) -> None:
        """That copy or step has completed; blocks that nothing else keeps are free now."""
        self.require_in_flight(blocks)
        for block in blocks:
            self._in_flight[block] -= 1
            if self._in_flight[block] == 0:
                self.num_in_flight -= 1
                if self._references[block] == 0:
                    if self._indexed[block]:
                        self.num_idle += 1
                    else:
                        self.num_landing -= 1
                        self._free.append(block)

    def audit(self) -> list[str]:
        """Recount from scratch; what doesn't agree with the counters, in words."""
        problems = []
        blocks = range(self.num_blocks)
        kept = {b for b in blocks if self._references[b] or self._indexed[b] or self._in_flight[b]}
        free = set(self._free)
        if len(free) != len(self._free):
            problems.append("a block stands twice in the free list")
        if both := free & kept:
            problems.append(f"blocks {sorted(both)} are free and kept")
        if leaked := set(blocks) - free - kept:
            problems.append(f"blocks {sorted(leaked)} are neither free nor kept")
        recounted = {
            "active": (self.num_active, sum(r > 0 for r in self._references)),
            "indexed": (self.num_indexed, sum(self._indexed)),
            "in flight": (self.num_in_flight, sum(i > 0 for i in self._in_flight)),
            "idle": (self.num_idle, sum(map(self.is_idle, blocks))),
            "landing": (self.num_landing, sum(map(self._is_landing, blocks))),
        }
        for name, (counted, true) in recounted.items():
            if counted != true:
                problems.append(f"{counted} blocks counted as {name}, {true} are")
        if any(count < 0 for count in (*self._references, *self._in_flight)):
            problems.append("a count is below zero")
        return problems

    def require_content(self, blocks: Iterable[int]) -> None:
        """PoolError unless each block exists and a reference or the index keeps its content."""
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise PoolError(f"there is no block {block} (the arena has {self.num_blocks})")
            if not self._references[block] and not self._indexed[block]:
                raise PoolError(f"block {block} holds no content")

    def require_references(self, blocks: Sequence[int]) -> None:
        """PoolError unless somebody holds each of these blocks, as often as it stands here."""
        self._require_counted(blocks, self._references, "a reference to")

    def require_in_flight(self, blocks: Sequence[int]) -> None:
        """PoolError unless a copy or step touches each of these, as often as it stands here."""
        self._require_counted(blocks, self._in_flight, "anything in flight on")

    def require_indexable(self, blocks: Sequence[int]) -> None:
        """PoolError unless each of these blocks is held and not indexed, and stands here once."""
        if len(set(blocks)) != len(blocks):
            raise PoolError("a block can't stand twice in the index")
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise PoolError(f"there is no block {block} (the arena has {self.num_blocks})")
            if self._references[block] == 0 or self._indexed[block]:
                state = "already indexed" if self._indexed[block] else "not held by its caller"
                raise PoolError(f"block {block} can't be indexed: it is {state}")

    def _is_landing(self, block: int) -> bool:
        kept = self._references[block] or self._indexed[block]
        return not kept and self._in_flight[block] > 0

    def _require_counted(self, blocks: Sequence[int], counts: Sequence[int], what: str) -> None:
        distinct = set(blocks)
        if len(distinct) == len(blocks):
            short = [b for b in blocks if not (0 <= b < self.num_blocks and counts[b])]
        else:
            times = Counter(blocks)
            short = [b for b, n in times.items() if not 0 <= b < self.num_blocks or counts[b] < n]
        if short:
            raise PoolError(f"nobody holds {what} blocks {short}")

    def _lose(self, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        self._on_content_lost(blocks)
        free = [block for block in blocks if self._in_flight[block] == 0]
        self._free.extend(free)
        self.num_landing += len(blocks) - len(free)
