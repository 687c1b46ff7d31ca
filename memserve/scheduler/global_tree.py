"""The global prompt tree: which instance holds which prefix, where, and what will soon be held.

Contract: workers' index events, applied in order, make it exact; a missing or impossible message makes
the tree forget that instance until it has told everything anew. What a dispatched ticket will leave
on an instance is *expected* there until the ticket ends, so that a burst of equal prompts meets.
A wrong guess costs time, never an answer: whoever uses a reference checks its generation.

As large as what the instances hold and the running tickets expect, never larger.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import assert_never

from memserve.messages import IndexEvents
from memserve.pool.events import Cleared, IndexEvent, Inserted, Moved, Removed
from memserve.pool.index import TOKEN_BYTES
from memserve.pool.refs import BlockRef
from memserve.pool.tree import walk
from memserve.scheduler.runs import (
    TIER_SHIFT,
    BlockTable,
    Inconsistent,
    Run,
    RunTree,
    pack_ref,
    unpack_ref,
)

SLOW = 1 << TIER_SHIFT
"""References from here on lie in another tier than the fastest."""


@dataclass(slots=True)
class Matches:
    """Leading blocks of a prompt by instance; who has none is left out."""

    held: dict[int, int] = field(default_factory=dict)
    slow: dict[int, int] = field(default_factory=dict)
    """Of those held, how many don't lie in the fastest tier; only where there are any."""
    expected: dict[int, int] = field(default_factory=dict)
    """Held now or as soon as the running tickets have computed them, where that is more."""

    def reach(self, instance: int) -> int:
        """Blocks held or expected."""
        return self.expected.get(instance) or self.held.get(instance, 0)


@dataclass(slots=True)
class _Source:
    """How far an instance's events have been followed."""

    epoch: int
    number: int = 0
    lost: bool = False
    """Whether a message was missed and everything must be told anew."""


class GlobalPromptTree:
    """Prefixes in whole blocks of `block_size` tokens, and their holders."""

    def __init__(self, block_size: int) -> None:
        self._stride = block_size * TOKEN_BYTES
        self._tree = RunTree(self._stride)
        self._sources: dict[int, _Source] = {}
        self._tiered: set[int] = set()
        """Instances that have held blocks in a slower tier."""

    def join(self, instance: int, epoch: int) -> None:
        """An instance is followed from now on; its index is empty."""
        if instance in self._sources:
            self._tree.forget(instance)
        self._tree.tables[instance] = BlockTable()
        self._sources[instance] = _Source(epoch)

    def leave(self, instance: int) -> None:
        """An instance has gone."""
        self._tree.forget(instance)
        self._tiered.discard(instance)
        del self._tree.tables[instance]
        del self._sources[instance]

    def forget(self, instance: int) -> None:
        """An instance's cache is empty. Events that then don't fit ask for a new report."""
        self._tree.forget(instance)

    # Look-ups

    def match(self, packed: bytes, salt: str) -> Matches:
        """How much of a packed prompt every instance has."""
        found = Matches()
        held, slow, expected = found.held, found.slow, found.expected
        for run, num_blocks in self._path(packed, salt):
            start = run.start
            for instance, refs in run.held.items():
                if instance not in held:
                    held[instance] = start + min(len(refs), num_blocks)
            for instance in self._tiered.intersection(run.held):
                refs = run.held[instance]
                count = min(len(refs), num_blocks)
                # Along a path, blocks of the fastest tier come first.
                if refs[count - 1] >= SLOW:
                    num_fast = bisect_left(refs, 1, 0, count, key=_is_slow)
                    slow[instance] = held[instance] - start - num_fast
            for instance in run.expected:
                if instance not in expected:
                    expected[instance] = start + num_blocks
        for instance in [i for i in expected if expected[i] <= held.get(i, 0)]:
            del expected[instance]
        return found

    def locate(self, instance: int, packed: bytes, salt: str) -> list[BlockRef]:
        """What an instance holds of a packed prompt, in order."""
        source = self._sources.get(instance)
        if source is None:
            return []
        found: list[BlockRef] = []
        for run, num_blocks in reversed([*self._path(packed, salt)]):
            for ref in run.held.get(instance, array("Q"))[:num_blocks]:
                tier, block, generation = unpack_ref(ref)
                found.append(BlockRef(instance, source.epoch, tier, block, generation))
        return found

    def _path(self, packed: bytes, salt: str) -> Iterator[tuple[Run, int]]:
        """The runs that a prompt walks over and how many blocks of each, the last run first."""
        root = self._tree.roots.get(salt)
        if root is None:
            return
        path, partial, _ = walk(root, packed, self._stride)
        for run in reversed(path):
            yield run, partial or self._tree.length(run)
            partial = 0

    # What is to come

    def expect(self, instance: int, packed: bytes, salt: str) -> None:
        """A ticket will leave this prompt's whole blocks on an instance; undone by `unexpect`."""
        packed = packed[: len(packed) - len(packed) % self._stride]
        if not packed:
            return
        root = self._tree.root(salt)
        path, partial, offset = walk(root, packed, self._stride)
        last = path[-1] if path else root
        if partial:
            last = path[-1] = self._tree.split(last, partial)
        if offset < len(packed):
            child = self._tree.grow(last, packed[offset:])
            if child is not last:
                path.append(child)
        for run in path:
            run.expected[instance] = run.expected.get(instance, 0) + 1

    def unexpect(self, instance: int, packed: bytes, salt: str) -> None:
        """A ticket that expected this has ended."""
        last: Run | None = None
        for run, num_blocks in self._path(packed, salt):
            assert num_blocks == self._tree.length(run)
            last = last or run
            if run.expected[instance] == 1:
                del run.expected[instance]
            else:
                run.expected[instance] -= 1
        if last is not None:
            self._tree.prune(last)

    # What instances tell

    def apply(self, instance: int, message: IndexEvents) -> bool:
        """Follow an instance's index; of one that isn't followed, nothing happens.

        False if the message doesn't follow the last one: nothing is known of the instance then, and
        its events are ignored until one comes that starts with `Cleared`.
        """
        source = self._sources.get(instance)
        if source is None:
            return True
        starts_anew = bool(message.events) and isinstance(message.events[0], Cleared)
        if source.lost and not starts_anew:
            return True
        follows = starts_anew or message.number == source.number + 1
        source.number = message.number
        source.lost = not (follows and self._apply_all(instance, message.events))
        if source.lost:
            # What was half applied may be in the table or in the runs alone: look everywhere.
            self._tree.expel(instance)
        return not source.lost

    def _apply_all(self, instance: int, events: list[IndexEvent]) -> bool:
        try:
            for event in events:
                self._apply(instance, event)
        except Inconsistent:
            return False
        return True

    def _apply(self, instance: int, event: IndexEvent) -> None:
        match event:
            case Inserted():
                if event.tier:
                    self._tiered.add(instance)
                self._insert(instance, event)
            case Removed(tier, blocks):
                self._remove(instance, tier, blocks)
            case Moved():
                if event.tier:
                    self._tiered.add(instance)
                self._move(instance, event)
            case Cleared():
                self._tree.forget(instance)
            case _:
                assert_never(event)

    def _insert(self, instance: int, event: Inserted) -> None:
        refs = array(
            "Q", map(pack_ref, [event.tier] * len(event.blocks), event.blocks, event.generations)
        )
        if len(event.tokens) != len(refs) * self._stride or not refs:
            raise Inconsistent("blocks and tokens disagree in number")
        if event.parent is None:
            self._tree.extend(instance, self._tree.root(event.salt), 0, event.tokens, refs)
        else:
            run, depth = self._tree.tables[instance].find(*event.parent)
            self._tree.extend(instance, run, depth - run.start + 1, event.tokens, refs)

    def _remove(self, instance: int, tier: int, blocks: list[int]) -> None:
        table = self._tree.tables[instance]
        depths_by_run: dict[Run, list[int]] = {}
        for block in blocks:
            run, depth = table.take(tier, block)
            depths_by_run.setdefault(run, []).append(depth)
        for run, depths in depths_by_run.items():
            refs = run.held[instance]
            num_kept = len(refs) - len(depths)
            if min(depths) != run.start + num_kept:
                raise Inconsistent("blocks were removed that others continue")
            del refs[num_kept:]
            if not num_kept:
                del run.held[instance]
        for run in sorted(depths_by_run, key=lambda run: -run.start):
            self._tree.prune(run)

    def _move(self, instance: int, event: Moved) -> None:
        table = self._tree.tables[instance]
        if not len(event.sources) == len(event.blocks) == len(event.generations):
            raise Inconsistent("a move's blocks disagree in number")
        places = [table.take(event.source_tier, source) for source in event.sources]
        for (run, depth), block, generation in zip(
            places, event.blocks, event.generations, strict=True
        ):
            ref = pack_ref(event.tier, block, generation)
            run.held[instance][depth - run.start] = ref
            table.put(ref, run, depth)

    def __len__(self) -> int:
        """Blocks in the tree, held or expected."""
        return sum(
            self._tree.length(run) for root in self._tree.roots.values() for run in root.subtree()
        )

    def audit(self) -> list[str]:
        """Recount from scratch; what is wrong, in words."""
        return self._tree.audit()


def _is_slow(ref: int) -> bool:
    return ref >= SLOW
