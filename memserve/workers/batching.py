"""Which tokens the next step computes: one scheduler without phases.

A step takes the newest token of every decoding sequence and, with what is left of its token budget,
chunks of prompts. A prompt is admitted when the pool has room for all of it, in ticket order; a
sequence that can't grow takes blocks from the youngest claim, which computes again later what it
lost (mostly a cache hit). A prompt that shares a prefix with one that is being computed waits for it
rather than computing the same blocks beside it.

Knows blocks and tickets, no tensors and no messages.
"""

from array import array
from bisect import insort
from operator import attrgetter

import numpy as np

from memserve.errors import OutOfBlocks
from memserve.pool.mempool import MemPool
from memserve.workers.claims import Claims
from memserve.workers.sequence import Sequence, Slice

BY_TICKET = attrgetter("ticket")


class Batcher:
    """The waiting and the running sequences of one worker."""

    def __init__(
        self, pool: MemPool, claims: Claims, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._pool = pool
        self._claims = claims
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that holds no blocks."""
        insort(self.waiting, sequence, key=BY_TICKET)

    def run(self, sequence: Sequence) -> None:
        """Run a sequence that holds its blocks already."""
        insort(self.running, sequence, key=BY_TICKET)
        self._claims.hold(sequence.ticket, lambda: self._preempt(sequence))

    def suspend(self, sequence: Sequence) -> None:
        """Stop running a sequence that keeps its blocks; its claim passes to the caller."""
        self.running.remove(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Drop a running sequence; its complete blocks become historical."""
        self.running.remove(sequence)
        self._claims.drop(sequence.ticket)
        self.release(sequence)

    def abort(self, ticket: int) -> None:
        """Drop a sequence wherever it is; what it computed may serve others."""
        for sequence in self.running:
            if sequence.ticket == ticket:
                self.finish(sequence)
                return
        self.waiting = [sequence for sequence in self.waiting if sequence.ticket != ticket]

    def keep(self, ticket: int) -> None:
        """Decode a sequence here that was to be handed over."""
        for sequence in (*self.running, *self.waiting):
            if sequence.ticket == ticket:
                sequence.decode_on = None

    def release(self, sequence: Sequence) -> None:
        """Index what a sequence has computed and let go of its blocks."""
        self.share(sequence)
        self._pool.free_mem(sequence.blocks)
        del sequence.blocks[:]
        sequence.num_computed = 0
        sequence.num_published = 0

    def share(self, sequence: Sequence) -> None:
        """Index the complete blocks of a sequence, so that others match them."""
        num_full = sequence.num_computed // self._pool.block_size
        if num_full:
            tokens = sequence.tokens[: num_full * self._pool.block_size]
            self._pool.insert(tokens, sequence.blocks[:num_full], sequence.cache_salt)

    def schedule(self) -> list[Slice]:
        """The slices of the next step, in batch order; empty when nothing can run."""
        budget = self._max_num_batched_tokens
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        slices = [Slice(sequence, 1) for sequence in decoding if self._grow(sequence)]
        slices = [
            part for part in slices if part.sequence.blocks
        ]  # preempted by an older one since
        budget -= len(slices)
        for sequence in self.running:
            if budget > 0 and sequence.num_pending > 1:
                slices.append(Slice(sequence, min(sequence.num_pending, budget)))
                budget -= slices[-1].num_tokens
        for sequence in tuple(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_num_seqs:
                break
            if self._in_the_making(sequence):
                continue
            if not self._admit(sequence):
                break
            slices.append(Slice(sequence, min(sequence.num_pending, budget)))
            budget -= slices[-1].num_tokens
        return slices

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token; False when the sequence must sit this step out."""
        if sequence not in self.running:  # preempted for the sake of an older one
            return False
        if sequence.num_computed < len(sequence.blocks) * self._pool.block_size:
            return True
        blocks = self._claims.allocate(1, above=sequence.ticket)
        if blocks is None:
            return False
        sequence.blocks.extend(blocks)
        return True

    def _in_the_making(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute a whole block that this one needs too."""
        size = self._pool.block_size
        for other in self.running:
            if other.num_pending == 1 or other.cache_salt != sequence.cache_salt:
                continue
            shared = common_prefix(other.tokens, sequence.tokens)
            if min(shared, len(sequence.tokens) - 1) // size > other.num_computed // size:
                return True
        return False

    def _admit(self, sequence: Sequence) -> bool:
        """Match the cache and take blocks for all pending tokens, or leave everything as it was.

        Beside its own blocks a newcomer must find one free block for each sequence that runs, lest
        it be preempted as soon as those grow.
        """
        match = self._pool.match(sequence.tokens[:-1], sequence.cache_salt)
        needed = -(-len(sequence.tokens) // self._pool.block_size) - len(match.blocks)
        try:
            reserve = self._pool.alloc_mem(needed + len(self.running))
        except OutOfBlocks:
            match.release()
            return False
        self._pool.free_mem(reserve[needed:])
        self.waiting.remove(sequence)
        sequence.blocks.extend(match.commit())
        sequence.num_computed = len(sequence.blocks) * self._pool.block_size
        if sequence.num_outputs == 0:
            sequence.num_cached_tokens = sequence.num_computed
        sequence.blocks.extend(reserve[:needed])
        self.run(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits and computes again what the cache has lost."""
        self.num_preemptions += 1
        self.finish(sequence)
        self.add(sequence)


def common_prefix(left: "array[int]", right: "array[int]") -> int:
    """Number of leading tokens that two token arrays share."""
    length = min(len(left), len(right))
    differ = np.frombuffer(left, np.int32, length) != np.frombuffer(right, np.int32, length)
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
