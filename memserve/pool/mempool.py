"""MemPool: the elastic memory of one instance, by the paper's local calls (Table 1).

Contract: active KV (referenced by a request) and historical KV (kept by the index for reuse) share
one arena without a fixed split; a block may be both. `alloc_mem` evicts historical blocks, least
recently used first, when no free ones are left; a block that anybody holds, that a match has
pinned, or that is in flight is never a victim.

- `alloc_mem`, `match` and `retain` take references; each ends with one `free_mem`. A match is
  released on leaving its `with` block unless it was committed, which makes its references the
  caller's.
- `insert` lends blocks to the index; the caller keeps its own references until it frees them. The
  content must be complete: every token's K and V of the inserted blocks is written.
- `begin_io` and `end_io` bracket every copy and every launched step that may touch a block,
  whoever runs it: the block is not allocated again in between, whatever becomes of its request.
- When a block loses its content its generation changes, before it can be allocated again: a
  reference that somebody still holds to it names nothing any more.

A call that raises has changed nothing. Single-threaded: the engine's main loop owns the pool; a
copy thread reports to the loop, which calls `end_io`. This class moves no bytes and knows no
tensor; other instances, other tiers and swapping are not its business.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, final

import msgspec

from memserve.errors import OutOfBlocks, PoolError
from memserve.pool.blocks import BlockAllocator
from memserve.pool.generations import GenerationTable
from memserve.pool.index import RadixIndex, Tokens, pack_tokens
from memserve.pool.refs import ArenaDescriptor, BlockRef

Holdings = Mapping[str, Sequence[int]]
"""Blocks by the name of who holds them; a block held twice stands twice."""


class PoolStats(msgspec.Struct, frozen=True):
    """Blocks by state (a block may be active, historical and in flight at once), and totals."""

    total: int
    free: int
    active: int
    historical: int
    in_flight: int
    evictions: int
    hit_tokens: int
    queried_tokens: int


@final
class Match:
    """The cached blocks of a prompt's longest whole-block prefix, pinned until released.

    A context manager: leaving it releases the blocks unless `commit` made them the caller's.
    """

    def __init__(self, pool: "MemPool", blocks: list[int]) -> None:
        self.blocks = blocks
        self._pool = pool

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V these blocks hold."""
        return len(self.blocks) * self._pool.block_size

    def commit(self) -> list[int]:
        """Hand the references to the caller, who ends them with `MemPool.free_mem`."""
        self._pool.settle(self)
        return self.blocks

    def release(self) -> None:
        """Unpin the blocks; nothing happens if they were committed or released before."""
        if self._pool.is_open(self):
            self._pool.settle(self)
            self._pool.free_mem(self.blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@final
class MemPool:
    """Allocation, prefix index and references of one arena; see the module for the contract."""

    def __init__(self, descriptor: ArenaDescriptor, generations: GenerationTable) -> None:
        self.descriptor = descriptor
        self.block_size = descriptor.layout.block_size
        self._generations = generations
        self._blocks = BlockAllocator(descriptor.layout.num_blocks, generations.bump)
        self._index: RadixIndex[int] = RadixIndex(self.block_size)
        self._open_matches: set[Match] = set()
        self._evictions = self._hit_tokens = self._queried_tokens = 0

    @property
    def num_available(self) -> int:
        """Blocks that are free or that eviction can free; an upper bound on one `alloc_mem`."""
        return self._blocks.num_free + self._blocks.num_idle

    def alloc_mem(self, num_blocks: int) -> list[int]:
        """`num_blocks` blocks for the caller to write, evicting historical ones if need be.

        Their content is undefined. Raises OutOfBlocks if even eviction can't yield so many.
        """
        missing = num_blocks - self._blocks.num_free
        if missing > 0:
            victims: list[int] = []
            if missing <= self._blocks.num_idle:
                victims = self._index.evict(missing, self._blocks.is_idle)
            if not victims:
                raise OutOfBlocks(
                    f"{num_blocks} blocks wanted, {self._blocks.num_free} free and "
                    f"at most {self._blocks.num_idle} evictable of {self._blocks.num_blocks}"
                )
            self._blocks.unindex(victims)
            self._evictions += len(victims)
        return self._blocks.allocate(num_blocks)

    def free_mem(self, blocks: Sequence[int]) -> None:
        """End one reference to each entry; what the index keeps stays reusable."""
        self._blocks.release(blocks)

    def retain(self, blocks: Sequence[int]) -> None:
        """One more reference to each block: for a lease, or to share a prefix between choices."""
        self._blocks.acquire(blocks)

    def match(self, tokens: Tokens, salt: str = "") -> Match:
        """Pin the longest cached whole-block prefix of `tokens`.

        Leave out the last token of a prompt, since one must always be computed. Prompts of
        different `salt` share nothing.
        """
        packed = pack_tokens(tokens)
        blocks = self._index.match(packed, salt)
        self._blocks.acquire(blocks)
        match = Match(self, blocks)
        self._open_matches.add(match)
        self._queried_tokens += len(packed) // 4
        self._hit_tokens += match.num_tokens
        return match

    def insert(self, tokens: Tokens, blocks: Sequence[int], salt: str = "") -> list[int]:
        """Keep for reuse: `blocks[i]` holds K and V of the i-th whole block of `tokens`.

        The caller holds all these blocks. Returns the blocks now cached for these tokens: where
        some were cached before, those stay and the caller's copies don't enter. They are not
        pinned.
        """
        packed = pack_tokens(tokens)
        num_whole = len(packed) // (4 * self.block_size)
        if len(blocks) > num_whole:
            raise PoolError(f"{num_whole} whole blocks of tokens can't fill {len(blocks)} blocks")
        packed = packed[: 4 * self.block_size * len(blocks)]
        num_known = len(self._index.match(packed, salt, touch=False))
        self._blocks.index(blocks[num_known:])
        return self._index.insert(packed, blocks, salt)

    def delete(self, tokens: Tokens, salt: str = "") -> int:
        """Drop a prompt's cached data and its continuations; the number of blocks dropped.

        Prefixes shared with other prompts stay. Requests that hold dropped blocks keep them.
        """
        dropped = self._index.delete(tokens, salt)
        self._blocks.unindex(dropped)
        return len(dropped)

    def reset(self) -> int:
        """Drop all historical blocks that nobody holds; the number of blocks dropped."""
        dropped = self._index.evict(len(self._index), self._blocks.is_idle, partial=True)
        self._blocks.unindex(dropped)
        return len(dropped)

    def refs(self, blocks: Sequence[int]) -> list[BlockRef]:
        """References to the present content of these blocks, for other instances.

        Take them when the content is complete: from then on a reader may copy it.
        """
        self._blocks.require_content(blocks)
        instance, epoch, tier = (
            self.descriptor.instance,
            self.descriptor.epoch,
            self.descriptor.tier,
        )
        return [
            BlockRef(instance, epoch, tier, block, generation)
            for block, generation in zip(blocks, self._generations.load(blocks), strict=True)
        ]

    def begin_io(self, blocks: Sequence[int]) -> None:
        """A copy or a launched step may read or write these blocks until `end_io`."""
        self._blocks.begin_io(blocks)

    def end_io(self, blocks: Sequence[int]) -> None:
        """That copy or step has completed."""
        self._blocks.end_io(blocks)

    @contextmanager
    def io(self, blocks: Sequence[int]) -> Iterator[None]:
        """`begin_io` and `end_io` around work that is over when the block is left."""
        self.begin_io(blocks)
        try:
            yield
        finally:
            self.end_io(blocks)

    def stats(self) -> PoolStats:
        """Present counts and totals since the start."""
        return PoolStats(
            total=self._blocks.num_blocks,
            free=self._blocks.num_free,
            active=self._blocks.num_active,
            historical=self._blocks.num_indexed,
            in_flight=self._blocks.num_in_flight,
            evictions=self._evictions,
            hit_tokens=self._hit_tokens,
            queried_tokens=self._queried_tokens,
        )

    def audit(self, holdings: Holdings, in_flight: Holdings | None = None) -> list[str]:
        """Recount everything from scratch; each problem in words, none if all is well.

        `holdings` names every holder of references (open matches are known here), `in_flight`
        every copy and step (None: not checked). Free, active, historical and in-flight blocks must
        make up the arena, every count must be explained, and every index entry must be live.
        """
        problems = [*self._blocks.audit(), *self._index.audit()]
        open_matches = {f"match {i}": m.blocks for i, m in enumerate(self._open_matches)}
        problems += self._unexplained("references", {**holdings, **open_matches})
        if in_flight is not None:
            problems += self._unexplained("in flight", in_flight)
        entries = [block for _, _, block in self._index]
        if len(set(entries)) != len(entries):
            problems.append("a block stands twice in the index")
        marked = {b for b in range(self._blocks.num_blocks) if self._blocks.is_indexed(b)}
        if marked != set(entries):
            problems.append(f"the index and the marks differ in {sorted(marked ^ set(entries))}")
        return problems

    def is_open(self, match: Match) -> bool:
        """Whether this match still pins its blocks."""
        return match in self._open_matches

    def settle(self, match: Match) -> None:
        """The references of `match` have another owner now; called by `Match`."""
        if match not in self._open_matches:
            raise PoolError("this match was committed or released before")
        self._open_matches.remove(match)

    def _unexplained(self, what: str, holdings: Holdings) -> list[str]:
        explained = Counter(block for blocks in holdings.values() for block in blocks)
        count = self._blocks.num_references if what == "references" else self._blocks.num_io
        problems = []
        for block in range(self._blocks.num_blocks):
            if count(block) != explained[block]:
                owners = [name for name, blocks in holdings.items() if block in blocks]
                counts = f"{count(block)} {what}, {explained[block]} explained"
                problems.append(f"block {block}: {counts} by {owners}")
        return problems
