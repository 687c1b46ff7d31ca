"""Bytes on their way to sequences that hold room for them: from own DRAM, from others, from files.

A sequence is admitted with room for all of its prompt. What of that lies elsewhere is copied into the
room in the background, from all its sources at once: first what the own DRAM has, then what other
instances were said to have, then what is found in files. When the last copy has ended, the sequence
goes on from the end of the longest gapless prefix. What could not be had (a reference whose content
has passed, a peer that has gone, a torn file) is computed: a miss, never an error. So is all that
waits for a thread that hangs (`memserve.workers.stalling`).

Contract: the destination of a copy is marked in flight from its start to its end, whatever becomes of
the sequence, which may give up its room at any moment: then nobody hears of the copy. Knows blocks
and sequences, moves no bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from memserve.pool.disk import Content
from memserve.pool.mempool import MemPool
from memserve.pool.pending import Swap
from memserve.pool.refs import BlockRef, Tier
from memserve.workers.sequence import Sequence, Source
from memserve.workers.stalling import STALL_S, Progress
from memserve.workers.swapping import Swapper


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """A copy of other instances' blocks: `refs[i]` goes to block `into[i]` of the own HBM."""

    refs: list[BlockRef]
    into: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class FileRead:
    """Blocks to be read out of files: `contents[i]` goes to block `into[i]` of HBM."""

    contents: list[Content]
    into: list[int]


Copy = Swap | Fetch | FileRead
StartFetch = Callable[[Fetch], None]
"""Copy in the background; `FetchDone` tells of its end."""


class Files(Protocol):
    """History in files: `memserve.workers.storing.DiskStore`."""

    def find(
        self, above: tuple[int, int] | None, salt: str, tokens: bytes, num_skipped: int
    ) -> list[Content]:
        """The blocks of `tokens`, which continue block `above`, that have a file, in a row."""
        ...

    def start_read(self, read: FileRead) -> None:
        """Read in the background; `FetchDone` tells of its end."""
        ...


@dataclass(slots=True, eq=False)
class Load:
    """A sequence that waits for copies; each fills the blocks that follow those of the one before."""

    sequence: Sequence
    copies: list[Copy] = field(default_factory=list)
    num_good: dict[Copy, int] = field(default_factory=dict)
    """By ended copy, how many of its first blocks are right."""

    @property
    def ended(self) -> bool:
        """Whether nothing is under way any more."""
        return len(self.num_good) == len(self.copies)

    @property
    def num_loaded(self) -> Counter[Source]:
        """Blocks that are right, up to the first that is not, by where they came from."""
        found: Counter[Source] = Counter()
        for copy in self.copies:
            found[source_of(copy)] += self.num_good[copy]
            if self.num_good[copy] < num_blocks(copy):
                break
        return found


def source_of(copy: Copy) -> Source:
    """Where the blocks of a copy lay."""
    match copy:
        case Swap():
            return Source.HOST
        case Fetch():
            return Source.P2P
        case FileRead():
            return Source.DISK


def num_blocks(copy: Copy) -> int:
    """Blocks that a copy is to fill."""
    return len(copy.destinations if isinstance(copy, Swap) else copy.into)


class Loads:
    """The sequences of one instance that wait for bytes, and the copies that bring them."""

    def __init__(
        self,
        pool: MemPool,
        swapper: Swapper,
        start_fetch: StartFetch,
        files: Files | None,
        *,
        patience: float = STALL_S,
    ) -> None:
        self._pool = pool
        self._swapper = swapper
        self._start_fetch = start_fetch
        self._files = files
        self._reads = Progress("reads of files", patience=patience)
        self._loads: dict[int, Load] = {}  # by ticket
        self._load_by_copy: dict[Copy, Load] = {}
        self.num_fetched_blocks = 0
        self.num_failed_fetches = 0
        self.num_late = 0
        """Copies that ended when nobody waited for them any more."""

    def __len__(self) -> int:
        return len(self._loads)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences that wait."""
        return iter([load.sequence for load in self._loads.values()])

    def begin(self, sequence: Sequence, in_dram: list[int]) -> bool:
        """Start all copies that help a sequence, which holds its room; False if there are none.

        Its KV is computed up to the last of its own blocks in HBM; `in_dram`, held by the caller, are
        the own blocks that come next.
        """
        load = Load(sequence)
        num_hbm = sequence.num_computed // self._pool.block_size
        num_own = num_hbm + len(in_dram)
        own = [*sequence.blocks[:num_hbm], *in_dram]
        if in_dram:
            into = list(sequence.blocks[num_hbm:num_own])
            load.copies.append(self._swapper.load(in_dram, into))
        refs = self._wanted(sequence, num_own)
        num_known = num_own + len(refs)
        if refs:
            fetch = Fetch(refs, list(sequence.blocks[num_own:num_known]))
            self._pool.begin_io(fetch.into)
            self._swapper.copies.begun(fetch)
            self._start_fetch(fetch)
            load.copies.append(fetch)
        if contents := self._in_files(sequence, own, num_known):
            into = list(sequence.blocks[num_known : num_known + len(contents)])
            load.copies.append(self._start_read(FileRead(contents, into)))
        for copy in load.copies:
            self._load_by_copy[copy] = load
        if load.copies:
            self._loads[sequence.ticket] = load
        return bool(load.copies)

    def cancel(self, ticket: int) -> Sequence | None:
        """Let a sequence wait no longer; its copies go on for nobody. None if it does not wait."""
        load = self._loads.pop(ticket, None)
        if load is None:
            return None
        for copy in load.copies:
            self._load_by_copy.pop(copy, None)
        return load.sequence

    def tend(self, now: float) -> list[int]:
        """Look at the clock; the tickets that wait for what does not move."""
        self._swapper.copies.tend(now)
        self._reads.tend(now)
        if not (self._swapper.copies.stalled or self._reads.stalled):
            return []
        return [
            ticket for ticket, load in self._loads.items() if any(map(self._hangs, load.copies))
        ]

    def swapped(self, swap: Swap) -> Sequence | None:
        """A swap was committed; the sequence that needs to wait no longer, if there is one."""
        self._swapper.copies.ended(swap)
        return self._ended(swap, len(swap.destinations))

    def fetched(self, copy: Fetch | FileRead, num_good: int) -> Sequence | None:
        """A copy has ended, its first `num_good` blocks verified; returns as `swapped` does."""
        self._pool.end_io(copy.into)
        (self._swapper.copies if isinstance(copy, Fetch) else self._reads).ended(copy)
        if isinstance(copy, Fetch):
            self.num_fetched_blocks += num_good
            self.num_failed_fetches += num_good < len(copy.into)
        return self._ended(copy, num_good)

    @property
    def copies_hang(self) -> bool:
        """Whether nothing comes out of the own DRAM or from others."""
        return self._swapper.copies.stalled

    def _hangs(self, copy: Copy) -> bool:
        thread = self._reads if isinstance(copy, FileRead) else self._swapper.copies
        return thread.stalled and copy in self._load_by_copy

    def _start_read(self, read: FileRead) -> FileRead:
        assert self._files is not None
        self._pool.begin_io(read.into)
        self._reads.begun(read)
        self._files.start_read(read)
        return read

    def _in_files(self, sequence: Sequence, own: list[int], num_known: int) -> list[Content]:
        """What files hold of a sequence from block `num_known` on; `own` are those in the index."""
        if self._files is None or not sequence.reuse or self._reads.stalled:
            return []
        size = self._pool.block_size
        above = None
        if own:
            above = (int(self._pool.tier_of(own[-1])), self._pool.place(own[-1]))
        tokens = sequence.tokens[len(own) * size : self._end(sequence) * size].tobytes()
        return self._files.find(above, sequence.cache_salt, tokens, num_known - len(own))

    def _end(self, sequence: Sequence) -> int:
        """Blocks that may be loaded: not that of the last token, which is computed."""
        return (len(sequence.tokens) - 1) // self._pool.block_size

    def _ended(self, copy: Copy, num_good: int) -> Sequence | None:
        load = self._load_by_copy.pop(copy, None)
        if load is None:
            self.num_late += not isinstance(copy, Swap) or copy.to is Tier.HBM
            return None
        load.num_good[copy] = num_good
        if not load.ended:
            return None
        sequence = load.sequence
        del self._loads[sequence.ticket]
        num_loaded = load.num_loaded
        sequence.num_computed += num_loaded.total() * self._pool.block_size
        if not sequence.counted:
            for source, num in num_loaded.items():
                sequence.num_loaded[source] = num * self._pool.block_size
        sequence.fetch = []
        return sequence

    def _wanted(self, sequence: Sequence, start: int) -> list[BlockRef]:
        """The references that came with a sequence, from block `start` on."""
        first = sequence.first_fetched_block
        if self.copies_hang:
            return []
        if sequence.fetch and start < first:
            # What the own index held when this was planned has gone: nothing continues it.
            self.num_failed_fetches += 1
            sequence.fetch = []
        return sequence.fetch[max(0, start - first) : max(0, self._end(sequence) - first)]
