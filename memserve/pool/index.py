"""Radix tree from token prefixes to one value per whole block, with least-recently-used eviction.

Contract: a prefix is cut into whole blocks of `block_size` tokens; what remains is ignored. Edges
are path-compressed: an edge holds the bytes of many blocks' tokens and one value per block, so that
a lookup compares long slices. Trees of different cache salts share nothing. A block is used
whenever a call walks over it; a value leaves only after all values that continue its prefix.

Knows neither memory nor processes: values are whatever the owner keeps per block. No torch here.
Single-threaded.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Tokens = bytes | Sequence[int]
"""Token ids, or what `pack_tokens` made of them."""

TOKEN_BYTES = 4

V = TypeVar("V")


def pack_tokens(tokens: Tokens) -> bytes:
    """Token ids as native int32 bytes; bytes are taken as packed already.

    Pack once where one sequence is looked up several times.
    """
    if isinstance(tokens, bytes):
        return tokens
    if isinstance(tokens, array) and tokens.typecode == "i":
        return tokens.tobytes()
    return array("i", tokens).tobytes()


class _Edge(Generic[V]):
    """A run of blocks without a branch inside; a root is an edge without blocks."""

    __slots__ = ("children", "key", "parent", "salt", "values")

    def __init__(self, key: bytes, values: list[V], parent: "_Edge[V] | None", salt: str) -> None:
        self.key = key  # int32 token bytes of len(values) blocks
        self.values = values
        self.parent = parent
        self.salt = salt
        self.children: dict[bytes, _Edge[V]] = {}  # by the tokens of the child's first block


class RadixIndex(Generic[V]):
    """Longest cached whole-block prefix of a token sequence, and one value for each of its blocks.

    `len()` is the number of values held.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be positive, not {block_size}")
        self.block_size = block_size
        self._stride = block_size * TOKEN_BYTES
        self._roots: dict[str, _Edge[V]] = {}
        # Least recently used first, and every edge before its parent: a use moves an edge to the
        # end before it moves the parent there. So the first edge is always a leaf.
        self._order: OrderedDict[_Edge[V], None] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def match(self, tokens: Tokens, salt: str = "", *, touch: bool = True) -> list[V]:
        """The values of the longest cached whole-block prefix of `tokens`.

        With `touch` its blocks count as used now; without, nothing changes.
        """
        root = self._roots.get(salt)
        if root is None:
            return []
        path, partial, _ = self._walk(root, pack_tokens(tokens))
        values: list[V] = []
        for edge in path:
            values += edge.values
        if partial:
            del values[len(values) - len(path[-1].values) + partial :]
        if touch and path:
            self._touch(self._split(path[-1], partial) if partial else path[-1])
        return values

    def insert(self, tokens: Tokens, values: Sequence[V], salt: str = "") -> list[V]:
        """Hold `values[i]` for block i of `tokens` wherever no value is held yet.

        Covers the first `len(values)` whole blocks of `tokens`, or all of them if there are fewer.
        Returns the values now held for these blocks: those held before stay and come first.
        """
        packed = pack_tokens(tokens)
        num_blocks = min(len(packed) // self._stride, len(values))
        if num_blocks == 0:
            return []
        packed = packed[: num_blocks * self._stride]
        root = self._roots.setdefault(salt, _Edge(b"", [], None, salt))
        path, partial, offset = self._walk(root, packed)
        held: list[V] = []
        for edge in path:
            held += edge.values
        last = path[-1] if path else root
        if partial:
            del held[len(held) - len(last.values) + partial :]
            last = self._split(last, partial)
        new_values = list(values[len(held) : num_blocks])
        if new_values:
            last = self._grow(last, packed[offset:], new_values)
        self._touch(last)
        return held + new_values

    def delete(self, tokens: Tokens, salt: str = "") -> list[V]:
        """Drop a prompt's cached blocks and all that continues it; the values dropped.

        Blocks that another cached sequence shares stay, and so does a prefix that ends where
        another sequence goes on.
        """
        packed = pack_tokens(tokens)
        root = self._roots.get(salt)
        if root is None or len(packed) < self._stride:
            return []
        path, partial, offset = self._walk(root, packed)
        if not path:
            return []
        last = path[-1]
        complete = offset == len(packed) - len(packed) % self._stride
        if not complete and (partial or last.children):
            return []
        dropped = self._drop_subtree(last)
        parent = last.parent
        while parent is not None and parent.parent is not None and not parent.children:
            dropped += parent.values
            parent = self._remove(parent)
        return dropped

    def evict(
        self, num_values: int, evictable: Callable[[V], bool], *, partial: bool = False
    ) -> list[V]:
        """Remove the `num_values` least recently used values, leaves first, and return them.

        A value goes only if `evictable` allows it and no value continues its prefix any more. If
        fewer can go, none goes, unless `partial` asks for as many as can. Values that may not go
        are in use: they count as used now.
        """
        plan, kept, found = self._plan_eviction(num_values, evictable)
        if found < num_values and not partial:
            return []
        evicted: list[V] = []
        for edge, count in plan:
            keep = len(edge.values) - count
            evicted += reversed(edge.values[keep:])
            if keep:
                del edge.values[keep:]
                edge.key = edge.key[: keep * self._stride]
                self._size -= count
            else:
                self._remove(edge)
        for edge in kept:
            self._touch(edge)
        return evicted

    def __iter__(self) -> Iterator[tuple[str, bytes, V]]:
        """Each value with its salt and the packed tokens of the whole prefix that it ends."""
        pending = [(edge, b"") for root in self._roots.values() for edge in root.children.values()]
        while pending:
            edge, prefix = pending.pop()
            for i, value in enumerate(edge.values, start=1):
                yield edge.salt, prefix + edge.key[: i * self._stride], value
            whole = prefix + edge.key
            pending += [(child, whole) for child in edge.children.values()]

    def audit(self) -> list[str]:
        """Recount from scratch; what is wrong with the tree, in words."""
        problems = []
        position = {edge: i for i, edge in enumerate(self._order)}
        pending = [edge for root in self._roots.values() for edge in root.children.values()]
        size = num_edges = 0
        while pending:
            edge = pending.pop()
            size += len(edge.values)
            num_edges += 1
            if not edge.values or len(edge.key) != len(edge.values) * self._stride:
                problems.append("an edge's tokens and values disagree in number")
            if edge not in position:
                problems.append("an edge is missing in the order of use")
            for first, child in edge.children.items():
                if not child.key.startswith(first) or child.parent is not edge:
                    problems.append("an edge hangs in the wrong place")
                if position.get(child, 0) > position.get(edge, 0):
                    problems.append("an edge counts as used before what continues it")
            pending += edge.children.values()
        if size != self._size:
            problems.append(f"{self._size} values counted, {size} held")
        if num_edges != len(self._order):
            problems.append(f"{len(self._order)} edges ordered, {num_edges} in the tree")
        if any(not root.children for root in self._roots.values()):
            problems.append("a salt without blocks is kept")
        return problems

    def _walk(self, root: _Edge[V], packed: bytes) -> tuple[list[_Edge[V]], int, int]:
        """Edges from the root along `packed`, and where the common prefix ends.

        The second value is the number of blocks in common with the last edge if that is not all
        of it, else 0; the third is the length of the common prefix in bytes.
        """
        stride = self._stride
        edge, offset, path = root, 0, []
        while child := edge.children.get(packed[offset : offset + stride]):
            path.append(child)
            if not packed.startswith(child.key, offset):
                common = self._common_blocks(child.key, packed, offset)
                return path, common, offset + common * stride
            offset += len(child.key)
            edge = child
        return path, 0, offset

    def _common_blocks(self, key: bytes, packed: bytes, offset: int) -> int:
        stride = self._stride
        low, high = 1, min(len(key), len(packed) - offset) // stride
        while low < high:
            middle = (low + high + 1) // 2
            start, end = low * stride, middle * stride
            if key[start:end] == packed[offset + start : offset + end]:
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, edge: _Edge[V], num_blocks: int) -> _Edge[V]:
        """Cut `edge` after `num_blocks`; returns the upper part, which the caller must touch."""
        assert edge.parent is not None
        cut = num_blocks * self._stride
        upper = _Edge(edge.key[:cut], edge.values[:num_blocks], edge.parent, edge.salt)
        edge.parent.children[edge.key[: self._stride]] = upper
        edge.key, edge.values, edge.parent = edge.key[cut:], edge.values[num_blocks:], upper
        upper.children[edge.key[: self._stride]] = edge
        self._order[upper] = None
        return upper

    def _grow(self, edge: _Edge[V], key: bytes, values: list[V]) -> _Edge[V]:
        """Hang new blocks below `edge`: a leaf grows longer, another edge gets a child."""
        self._size += len(values)
        if edge.parent is not None and not edge.children:
            edge.key += key
            edge.values += values
            return edge
        child = _Edge(key, values, edge, edge.salt)
        edge.children[key[: self._stride]] = child
        self._order[child] = None
        return child

    def _touch(self, edge: _Edge[V]) -> None:
        """`edge` and all above it are used now."""
        step: _Edge[V] | None = edge
        while step is not None and step.parent is not None:
            self._order.move_to_end(step)
            step = step.parent

    def _remove(self, edge: _Edge[V]) -> _Edge[V]:
        """Take an edge without children out of the tree; returns its parent."""
        parent = edge.parent
        assert parent is not None
        assert not edge.children
        del parent.children[edge.key[: self._stride]]
        del self._order[edge]
        self._size -= len(edge.values)
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]
        return parent

    def _drop_subtree(self, top: _Edge[V]) -> list[V]:
        edges = [top]
        for edge in edges:
            edges += edge.children.values()
        dropped: list[V] = []
        for edge in reversed(edges):
            dropped += edge.values
            self._remove(edge)
        return dropped

    def _plan_eviction(
        self, num_values: int, evictable: Callable[[V], bool]
    ) -> tuple[list[tuple[_Edge[V], int]], list[_Edge[V]], int]:
        """How many values to cut off the end of which edges, and the leaves that must stay.

        One pass is enough, since every edge comes before its parent.
        """
        plan: list[tuple[_Edge[V], int]] = []
        kept: list[_Edge[V]] = []
        num_gone: dict[_Edge[V], int] = {}  # children planned away, by parent
        found = 0
        for edge in self._order:
            if found >= num_values:
                break
            if len(edge.children) > num_gone.get(edge, 0):
                continue
            wanted = min(num_values - found, len(edge.values))
            count = 0
            while count < wanted and evictable(edge.values[-1 - count]):
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
