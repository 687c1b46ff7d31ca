"""Radix tree from token prefixes to one value per whole block, with least-recently-used eviction.

Contract: a prefix is cut into whole blocks of `block_size` tokens; what remains is ignored. Edges
are path-compressed: an edge holds the bytes of many blocks' tokens and one value per block, so that
a lookup compares long slices. Trees of different cache salts share nothing. A block is used
whenever a call walks over it; a value leaves only after all values that continue its prefix.

Values stand on levels, 0 being the fastest memory: along a prefix the level never falls. Each level
has its own order of use. A value moves to a slower level only after all that continue it, and to a
faster one only when all before it are there.

Knows neither memory nor processes: values are whatever the owner keeps per block; where there are
several levels, each value stands in the index at most once. No torch here. Single-threaded.
"""

import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from memserve.pool.tree import Edge, EdgeTree, walk

Tokens = bytes | Sequence[int]
"""Token ids, or what `pack_tokens` made of them."""

TOKEN_BYTES = 4
PIECE = 1024
"""Tokens packed by one call."""
PACK_PIECE = struct.Struct(f"{PIECE}i").pack

V = TypeVar("V")


def pack_tokens(tokens: Tokens) -> bytes:
    """Token ids as native int32 bytes; bytes are taken as packed already.

    Pack once where one sequence is looked up several times.
    """
    if isinstance(tokens, bytes):
        return tokens
    if isinstance(tokens, array) and tokens.typecode == "i":
        return tokens.tobytes()
    try:
        # Twice as fast as array("i", tokens), as long as the arguments stay few: a tuple of all of
        # a long prompt is memory new from the system at each call.
        if len(tokens) <= PIECE:
            return struct.pack(f"{len(tokens)}i", *tokens)
        whole = len(tokens) // PIECE * PIECE
        pieces = [PACK_PIECE(*tokens[i : i + PIECE]) for i in range(0, whole, PIECE)]
        pieces.append(struct.pack(f"{len(tokens) - whole}i", *tokens[whole:]))
        return b"".join(pieces)
    except struct.error as error:
        raise OverflowError(f"a token is no int32: {error}") from None


class RadixIndex(Generic[V]):
    """Longest cached whole-block prefix of a token sequence, and one value for each of its blocks.

    `len()` is the number of values held.
    """

    def __init__(self, block_size: int, num_levels: int = 1) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be positive, not {block_size}")
        self.block_size = block_size
        self._stride = block_size * TOKEN_BYTES
        self._tree: EdgeTree[V] = EdgeTree(self._stride, num_levels)

    def __len__(self) -> int:
        return self._tree.size

    def match(self, tokens: Tokens, salt: str = "", *, touch: bool = True) -> list[V]:
        """The values of the longest cached whole-block prefix of `tokens`.

        With `touch` its blocks count as used now; without, nothing changes.
        """
        path, partial, _ = walk(self._tree.root(salt), pack_tokens(tokens), self._stride)
        values = self._held(path, partial)
        if touch and path:
            self._tree.touch(self._tree.split(path[-1], partial) if partial else path[-1])
        return values

    def insert(
        self, tokens: Tokens, values: Sequence[V], salt: str = "", *, level: int = 0
    ) -> list[V]:
        """Hold `values[i]` for block i of `tokens` wherever no value is held yet.

        Covers the first `len(values)` whole blocks of `tokens`, or all of them if there are fewer.
        New values stand on `level`, which must not be faster than what is held for their prefix.
        Returns the values now held for these blocks: those held before stay and come first.
        """
        packed = pack_tokens(tokens)
        num_blocks = min(len(packed) // self._stride, len(values))
        if num_blocks == 0:
            return []
        packed = packed[: num_blocks * self._stride]
        root = self._tree.root(salt)
        path, partial, offset = walk(root, packed, self._stride)
        held = self._held(path, partial)
        last = path[-1] if path else root
        if partial:
            last = self._tree.split(last, partial)
        new_values = list(values[len(held) : num_blocks])
        if new_values:
            last = self._tree.grow(last, packed[offset:], new_values, level)
        self._tree.touch(last)
        return held + new_values

    def delete(self, tokens: Tokens, salt: str = "") -> list[V]:
        """Drop a prompt's cached blocks and all that continues it; the values dropped.

        Blocks that another cached sequence shares stay, and so does a prefix that ends where
        another sequence goes on.
        """
        packed = pack_tokens(tokens)
        path, partial, offset = walk(self._tree.root(salt), packed, self._stride)
        if not path:
            return []
        last = path[-1]
        complete = offset == len(packed) - len(packed) % self._stride
        if not complete and (partial or last.children):
            return []
        parent = last.parent
        dropped = self._tree.drop(last.subtree())
        while parent is not None and parent.parent is not None and not parent.children:
            dropped += parent.values
            parent = self._tree.remove(parent)
        return dropped

    def evict(
        self,
        num_values: int,
        evictable: Callable[[V], bool],
        *,
        partial: bool = False,
        level: int = 0,
    ) -> list[V]:
        """Remove the `num_values` least recently used values of a level, leaves first.

        A value goes only if `evictable` allows it and no value of its level continues its prefix any
        more; those on slower levels that continue it go with it, if all of them may, beyond the
        number asked. If fewer can go, none goes, unless `partial` asks for as many as can. Values
        that may not go are in use: they count as used now. Returns all values removed.
        """
        plan, kept, found = self._plan(num_values, evictable, level, with_slower=True)
        if found < num_values and not partial:
            return []
        evicted: list[V] = []
        for edge, count in plan:
            evicted += self._tree.drop(edge.subtree()[1:])
            evicted += self._tree.cut(edge, count)
        for edge in kept:
            self._tree.touch(edge)
        return evicted

    def coldest(self, num_values: int, eligible: Callable[[V], bool], level: int = 0) -> list[V]:
        """Up to `num_values` least recently used values of a level, leaves first; all stay.

        A value is among them only if all values of its level that continue it are.
        """
        plan, _, _ = self._plan(num_values, eligible, level, with_slower=False)
        return [value for edge, count in plan for value in edge.values[: -count - 1 : -1]]

    def move(self, new_by_old: Mapping[V, V], level: int) -> list[V]:
        """Give blocks a new value on another level, as far as levels then never fall along a prefix.

        Returns the old values that left. To a slower level the last blocks of a prefix go first,
        and the order of use of those that stay is kept; blocks that come to a faster level count as
        used now.
        """
        found = {edge for old in new_by_old if (edge := self._tree.edge_by_value.get(old))}
        edges = sorted(found, key=lambda edge: edge.depth)
        moved: list[V] = []
        for edge in reversed(edges):
            if edge.level < level:
                moved += self._demote(edge, new_by_old, level)
        for edge in edges:
            if edge.level > level:
                moved += self._promote(edge, new_by_old, level)
        return moved

    def hottest(self) -> Iterator[tuple[str, bytes, list[V]]]:
        """Salt, packed tokens and values of every prefix that ends an edge.

        Most recently used first, faster levels before slower ones, and every prefix after those
        that it continues.
        """
        for order in self._tree.orders:
            for edge in reversed(order):
                path = [*reversed([*edge.ancestors()]), edge]
                values = [value for step in path for value in step.values]
                yield edge.salt, b"".join(step.key for step in path), values

    def runs(self) -> Iterator[tuple[str, V | None, bytes, list[V]]]:
        """All values as runs: salt, the value that a run continues, its packed tokens, its values.

        Every run comes after the one that it continues; None starts a prompt.
        """
        for root in self._tree.roots.values():
            for edge in root.subtree()[1:]:
                above = edge.parent.values[-1] if edge.parent and edge.parent.values else None
                yield edge.salt, above, edge.key, edge.values

    def __iter__(self) -> Iterator[tuple[str, bytes, V]]:
        """Each value with its salt and the packed tokens of the whole prefix that it ends."""
        roots = self._tree.roots.values()
        pending = [(edge, b"") for root in roots for edge in root.children.values()]
        while pending:
            edge, prefix = pending.pop()
            for i, value in enumerate(edge.values, start=1):
                yield edge.salt, prefix + edge.key[: i * self._stride], value
            whole = prefix + edge.key
            pending += [(child, whole) for child in edge.children.values()]

    def audit(self) -> list[str]:
        """Recount from scratch; what is wrong with the tree, in words."""
        return self._tree.audit()

    def _held(self, path: list[Edge[V]], partial: int) -> list[V]:
        """The values along a walk."""
        held: list[V] = []
        for edge in path:
            held += edge.values
        if partial:
            del held[len(held) - len(path[-1].values) + partial :]
        return held

    def _demote(self, edge: Edge[V], new_by_old: Mapping[V, V], level: int) -> list[V]:
        """Move as much of the end of `edge` as is asked for, if nothing faster continues it."""
        if any(child.level < level for child in edge.children.values()):
            return []
        start = len(edge.values)
        while start and edge.values[start - 1] in new_by_old:
            start -= 1
        moved = edge.values[start:]
        if not moved:
            return []
        if start:
            # What stays is as cold as it was: nothing on its level continues it now, and what
            # leaves was the coldest of that level.
            upper = self._tree.split(edge, start)
            self._tree.orders[upper.level].move_to_end(upper, last=False)
        self._tree.replace(edge, [new_by_old[old] for old in moved])
        self._tree.set_level(edge, level)
        self._tree.join(edge)
        return moved

    def _promote(self, edge: Edge[V], new_by_old: Mapping[V, V], level: int) -> list[V]:
        """Move as much of the start of `edge` as is asked for, if all before it is there."""
        parent = edge.parent
        assert parent is not None
        if parent.level > level:
            return []
        end = 0
        while end < len(edge.values) and edge.values[end] in new_by_old:
            end += 1
        moved = edge.values[:end]
        if not moved:
            return []
        upper = self._tree.split(edge, end) if end < len(edge.values) else edge
        self._tree.replace(upper, [new_by_old[old] for old in moved])
        self._tree.set_level(upper, level)
        self._tree.touch(upper)
        self._tree.join(parent)
        return moved

    def _plan(
        self, num_values: int, eligible: Callable[[V], bool], level: int, *, with_slower: bool
    ) -> tuple[list[tuple[Edge[V], int]], list[Edge[V]], int]:
        """How many values to take off the end of which edges, and the leaves that must stay.

        One pass is enough, since every edge comes before its parent. `with_slower`: what continues
        an edge on slower levels must be eligible too.
        """
        plan: list[tuple[Edge[V], int]] = []
        kept: list[Edge[V]] = []
        num_gone: dict[Edge[V], int] = {}  # children planned away, by parent
        found = 0
        for edge in self._tree.orders[level]:
            if found >= num_values:
                break
            if edge.num_beside > num_gone.get(edge, 0):
                continue
            wanted = min(num_values - found, len(edge.values))
            count = 0
            if not with_slower or self._slower_may_go(edge, eligible):
                while count < wanted and eligible(edge.values[-1 - count]):
                    count += 1
            if count:
                plan.append((edge, count))
                found += count
            if count == len(edge.values):
                assert edge.parent is not None
                num_gone[edge.parent] = num_gone.get(edge.parent, 0) + 1
            elif count < wanted:
                kept.append(edge)
        return plan, kept, found

    def _slower_may_go(self, edge: Edge[V], eligible: Callable[[V], bool]) -> bool:
        if len(edge.children) == edge.num_beside:
            return True
        slower = (child for child in edge.children.values() if child.level > edge.level)
        return all(eligible(v) for child in slower for e in child.subtree() for v in e.values)
