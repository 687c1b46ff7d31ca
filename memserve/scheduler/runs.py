"""The runs of the global prompt tree: what they hold for whom, how they are cut, grown and pruned.

Contract: a run is a stretch of whole blocks without a branch. Of the blocks of a path an instance
always holds a prefix, so a run keeps per instance one array with the references of its first blocks.
An instance's `BlockTable` finds the run of any of its blocks by the block's number, which is how
index events name them. A run goes when nobody holds or expects any of it and nothing continues it.

A reference is one 64-bit number here: 4 bits tier, 28 bits block, 32 bits generation.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import final

from memserve.pool.tree import common_blocks

NUM_BLOCK_BITS = 28
TIER_SHIFT = 60
MAX_BLOCKS = 1 << NUM_BLOCK_BITS


class Inconsistent(Exception):
    """An instance's events don't fit what was known of it."""


def pack_ref(tier: int, block: int, generation: int) -> int:
    """A reference within an instance as one number."""
    if not 0 <= block < MAX_BLOCKS:
        raise Inconsistent(f"block {block} can't exist")
    return tier << TIER_SHIFT | block << 32 | generation & 0xFFFFFFFF


def unpack_ref(ref: int) -> tuple[int, int, int]:
    """Tier, block and generation."""
    return ref >> TIER_SHIFT, ref >> 32 & (MAX_BLOCKS - 1), ref & 0xFFFFFFFF


@final
class Run:
    """Blocks without a branch among them; a root is a run without blocks."""

    __slots__ = ("children", "expected", "held", "key", "parent", "salt", "start")

    def __init__(self, key: bytes, start: int, parent: "Run | None", salt: str) -> None:
        self.key = key  # int32 token bytes
        self.start = start  # number of blocks above
        self.parent = parent
        self.salt = salt
        self.children: dict[bytes, Run] = {}  # by the tokens of the child's first block
        self.held: dict[int, array[int]] = {}  # by instance: references of its first blocks
        self.expected: dict[int, int] = {}  # by instance: tickets that will leave all of it there

    def subtree(self) -> "list[Run]":
        """This run and all below it, every run before its children."""
        runs = [self]
        for run in runs:
            runs += run.children.values()
        return runs


@final
class BlockTable:
    """Where in the tree each block of one instance stands: its run, its number in the prompt."""

    def __init__(self) -> None:
        self._runs: list[list[Run | None]] = []
        self._depths: list[array[int]] = []

    def put(self, ref: int, run: Run, depth: int) -> None:
        """A block that isn't in the table stands at this place."""
        tier, block, _ = unpack_ref(ref)
        while tier >= len(self._runs):
            self._runs.append([])
            self._depths.append(array("I"))
        runs, depths = self._runs[tier], self._depths[tier]
        if block >= len(runs):
            num_more = max(block + 1 - len(runs), min(len(runs), 4096))
            runs += [None] * num_more
            depths.extend([0] * num_more)
        if runs[block] is not None:
            raise Inconsistent(f"block {block} of tier {tier} is held twice")
        runs[block] = run
        depths[block] = depth

    def find(self, tier: int, block: int) -> tuple[Run, int]:
        """The block's place."""
        if 0 <= tier < len(self._runs) and 0 <= block < len(self._runs[tier]):
            run = self._runs[tier][block]
            if run is not None:
                return run, self._depths[tier][block]
        raise Inconsistent(f"block {block} of tier {tier} isn't held")

    def take(self, tier: int, block: int) -> tuple[Run, int]:
        """The block's place; it leaves the table."""
        found = self.find(tier, block)
        self._runs[tier][block] = None
        return found

    def relocate(self, refs: Iterable[int], run: Run) -> None:
        """These blocks stand in another run now, as deep as before."""
        for ref in refs:
            self._runs[ref >> TIER_SHIFT][ref >> 32 & (MAX_BLOCKS - 1)] = run

    def runs(self) -> set[Run]:
        """All runs that the instance holds something of."""
        return {run for runs in self._runs for run in runs if run is not None}

    def __iter__(self) -> Iterator[tuple[int, int, Run, int]]:
        """Tier, block, run and depth of every block."""
        for tier, runs in enumerate(self._runs):
            for block, run in enumerate(runs):
                if run is not None:
                    yield tier, block, run, self._depths[tier][block]


@final
class RunTree:
    """Runs by salt, and the tables of the instances that hold them."""

    def __init__(self, stride: int) -> None:
        self.stride = stride  # bytes of one block's tokens
        self.roots: dict[str, Run] = {}
        self.tables: dict[int, BlockTable] = {}

    def length(self, run: Run) -> int:
        """Number of blocks."""
        return len(run.key) // self.stride

    def root(self, salt: str) -> Run:
        """The root of a salt, made if there is none."""
        return self.roots.setdefault(salt, Run(b"", 0, None, salt))

    def grow(self, run: Run, key: bytes) -> Run:
        """Hang new blocks below the end of a run; the run that holds them.

        A leaf that no ticket expects anywhere grows longer instead.
        """
        if run.parent is not None and not run.children and not run.expected:
            run.key += key
            return run
        child = Run(key, run.start + self.length(run), run, run.salt)
        run.children[key[: self.stride]] = child
        return child

    def split(self, run: Run, num_blocks: int) -> Run:
        """Cut a run after `num_blocks`; the upper part, a new run."""
        parent = run.parent
        assert parent is not None
        cut = num_blocks * self.stride
        upper = Run(run.key[:cut], run.start, parent, run.salt)
        parent.children[run.key[: self.stride]] = upper
        run.key, run.start, run.parent = run.key[cut:], run.start + num_blocks, upper
        upper.children[run.key[: self.stride]] = run
        upper.expected = dict(run.expected)
        lower: dict[int, array[int]] = {}
        for instance, refs in run.held.items():
            upper.held[instance] = refs[:num_blocks]
            self.tables[instance].relocate(refs[:num_blocks], upper)
            if len(refs) > num_blocks:
                lower[instance] = refs[num_blocks:]
        run.held = lower
        return upper

    def hold(self, instance: int, run: Run, at: int, refs: "array[int]") -> None:
        """The instance holds these blocks of a run, from its number `at` on."""
        held = run.held.setdefault(instance, array("Q"))
        if len(held) != at:
            raise Inconsistent(f"{len(held)} blocks of a run were held, not {at}")
        held.extend(refs)
        table = self.tables[instance]
        for depth, ref in enumerate(refs, start=run.start + at):
            table.put(ref, run, depth)

    def extend(self, instance: int, run: Run, at: int, packed: bytes, refs: "array[int]") -> None:
        """The instance holds the blocks of `packed`, which come after number `at` of `run`."""
        stride, offset, done = self.stride, 0, 0
        while done < len(refs):
            common = common_blocks(run.key, at * stride, packed, offset, stride)
            if common:
                self.hold(instance, run, at, refs[done : done + common])
                done, offset, at = done + common, offset + common * stride, at + common
                continue
            length = self.length(run)
            child = run.children.get(packed[offset : offset + stride]) if at == length else None
            if child is None:
                upper = self.split(run, at) if at < length else run
                child = self.grow(upper, packed[offset:])
                at = length if child is upper else 0
            else:
                at = 0
            run = child

    def prune(self, run: Run) -> None:
        """Let go of what nobody holds or expects, from a run upwards."""
        while not run.held and not run.expected and not run.children:
            parent = run.parent
            if parent is None:
                if self.roots.get(run.salt) is run:
                    del self.roots[run.salt]
                return
            # A run that an earlier call let go of is no longer its parent's child.
            if parent.children.get(run.key[: self.stride]) is not run:
                return
            del parent.children[run.key[: self.stride]]
            run = parent
        if run.parent is not None and not run.children and not run.expected:
            longest = max(map(len, run.held.values()))
            if longest < self.length(run):
                run.key = run.key[: longest * self.stride]

    def forget(self, instance: int) -> None:
        """The instance holds nothing any more."""
        runs = self.tables[instance].runs()
        self.tables[instance] = BlockTable()
        for run in runs:
            del run.held[instance]
        for run in sorted(runs, key=lambda run: -run.start):
            self.prune(run)

    def expel(self, instance: int) -> None:
        """Like `forget`, where table and runs may disagree: looks at every run."""
        self.tables[instance] = BlockTable()
        for root in list(self.roots.values()):
            for run in reversed(root.subtree()):
                run.held.pop(instance, None)
                self.prune(run)

    def audit(self) -> list[str]:
        """Recount from scratch; what is wrong, in words."""
        problems = []
        num_held = dict.fromkeys(self.tables, 0)
        for salt, root in self.roots.items():
            if root.held or root.expected or not (root.children and root.salt == salt):
                problems.append("a root holds something, or has nothing below it")
            for run in root.subtree():
                problems += self._problems(run)
                for instance, refs in run.held.items():
                    num_held[instance] = num_held.get(instance, 0) + len(refs)
        for instance, table in self.tables.items():
            places = list(table)
            if len(places) != num_held[instance]:
                problems.append(f"{len(places)} blocks in the table, {num_held[instance]} held")
            for tier, block, run, depth in places:
                refs = run.held.get(instance, array("Q"))
                at = depth - run.start
                if not 0 <= at < len(refs) or unpack_ref(refs[at])[:2] != (tier, block):
                    problems.append(f"block {block} isn't where the table says")
        return problems

    def _problems(self, run: Run) -> list[str]:
        problems = []
        length = self.length(run)
        if run.parent is not None:
            parent = run.parent
            if not run.held and not run.expected and not run.children:
                problems.append("a run is kept for nobody")
            if parent.children.get(run.key[: self.stride]) is not run or not run.key:
                problems.append("a run hangs in the wrong place")
            if run.start != parent.start + self.length(parent):
                problems.append("a run doesn't know how deep it is")
            for instance in run.held:
                full = self.length(parent)
                if parent.parent is not None and len(parent.held.get(instance, ())) != full:
                    problems.append("an instance holds what continues what it doesn't hold")
            if any(run.expected[i] > parent.expected.get(i, 0) for i in run.expected) and (
                parent.parent is not None
            ):
                problems.append("more is expected below than above")
        if any(not 0 < len(refs) <= length for refs in run.held.values()):
            problems.append("more is held of a run than there is, or nothing")
        return problems
