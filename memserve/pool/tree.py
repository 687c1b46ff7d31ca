"""The edges of a radix index: how they are cut, grown, joined, and ordered by use.

Contract: an edge holds a run of whole blocks without a branch inside, all on one *level* (0 is the
fastest memory). Nothing on a faster level hangs below an edge of a slower one. Each level has an
order of use, least recently used first, in which every edge stands before its parent: a use moves an
edge to the end before it moves the parent there. So the first edge of a level has no child on that
level.

`RadixIndex` decides; nothing here knows what a lookup or an eviction is. No torch here.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar, cast, final

V = TypeVar("V")


class Node(Protocol):
    """What `walk` needs of an edge: the tokens of its blocks, and what continues them."""

    key: bytes

    @property
    def children(self) -> "Mapping[bytes, Node]":
        """The edges below, by the tokens of their first block."""
        ...


N = TypeVar("N", bound=Node)


def common_blocks(key: bytes, start: int, packed: bytes, offset: int, stride: int) -> int:
    """How many blocks `key` from byte `start` on has in common with `packed` from `offset` on."""
    low, high = 0, min(len(key) - start, len(packed) - offset) // stride
    if key[start : start + high * stride] == packed[offset : offset + high * stride]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        begin, end = low * stride, middle * stride
        if key[start + begin : start + end] == packed[offset + begin : offset + end]:
            low = middle
        else:
            high = middle - 1
    return low


def walk(root: N, packed: bytes, stride: int) -> tuple[list[N], int, int]:
    """Edges from the root along `packed`, and where the common prefix ends.

    The second value is the number of blocks in common with the last edge if that is not all of it,
    else 0; the third is the length of the common prefix in bytes.
    """
    edge, offset = root, 0
    path: list[N] = []
    while child := cast("N | None", edge.children.get(packed[offset : offset + stride])):
        path.append(child)
        if not packed.startswith(child.key, offset):
            common = common_blocks(child.key, 0, packed, offset, stride)
            return path, common, offset + common * stride
        offset += len(child.key)
        edge = child
    return path, 0, offset


@final
class Edge(Generic[V]):
    """A run of blocks; a root is an edge without blocks. The tree alone changes its structure."""

    __slots__ = ("children", "key", "level", "num_beside", "parent", "salt", "values")

    def __init__(
        self, key: bytes, values: list[V], parent: "Edge[V] | None", salt: str, level: int
    ) -> None:
        self.key = key  # int32 token bytes of len(values) blocks
        self.values = values
        self.parent = parent
        self.salt = salt
        self.level = level
        self.children: dict[bytes, Edge[V]] = {}  # by the tokens of the child's first block
        self.num_beside = 0  # children on this edge's own level

    @property
    def depth(self) -> int:
        """Number of edges above, the root included."""
        return sum(1 for _ in self.ancestors())

    def ancestors(self) -> "Iterator[Edge[V]]":
        """The edges above, the root last."""
        step = self.parent
        while step is not None:
            yield step
            step = step.parent

    def subtree(self) -> "list[Edge[V]]":
        """This edge and all below it, every edge before its children."""
        edges = [self]
        for edge in edges:
            edges += edge.children.values()
        return edges


@final
class EdgeTree(Generic[V]):
    """Edges by salt; `size` values in all and, if there are several levels, where each of them is."""

    def __init__(self, stride: int, num_levels: int) -> None:
        self.stride = stride  # bytes of one block's tokens
        self.roots: dict[str, Edge[V]] = {}
        self.orders: list[OrderedDict[Edge[V], None]] = [OrderedDict() for _ in range(num_levels)]
        self.size = 0
        self.edge_by_value: dict[V, Edge[V]] = {}
        self._locating = num_levels > 1

    def root(self, salt: str) -> Edge[V]:
        """The root of a salt, made if there is none; it stays only if something grows on it."""
        return self.roots.get(salt) or Edge(b"", [], None, salt, 0)

    def grow(self, edge: Edge[V], key: bytes, values: list[V], level: int) -> Edge[V]:
        """Hang new blocks below `edge`; a leaf of that level grows longer instead.

        Returns the edge that holds them, which the caller must touch.
        """
        assert level >= edge.level
        if edge.parent is not None and not edge.children and edge.level == level:
            edge.key += key
            edge.values += values
            child = edge
        else:
            child = Edge(key, values, edge, edge.salt, level)
            self._hang(child)
            self.orders[level][child] = None
            if edge.parent is None:
                self.roots[edge.salt] = edge
        self.size += len(values)
        self._locate(child, values)
        return child

    def split(self, edge: Edge[V], num_blocks: int) -> Edge[V]:
        """Cut `edge` after `num_blocks`; returns the upper part, to be touched by the caller."""
        assert edge.parent is not None
        cut = num_blocks * self.stride
        upper = Edge(edge.key[:cut], edge.values[:num_blocks], edge.parent, edge.salt, edge.level)
        edge.parent.children[edge.key[: self.stride]] = upper
        edge.key, edge.values, edge.parent = edge.key[cut:], edge.values[num_blocks:], upper
        self._hang(edge)
        self.orders[upper.level][upper] = None
        self._locate(upper, upper.values)
        return upper

    def cut(self, edge: Edge[V], num_blocks: int) -> list[V]:
        """Drop the last `num_blocks` of an edge without children, the last first."""
        assert not edge.children
        if num_blocks == len(edge.values):
            self.remove(edge)
            return edge.values[::-1]
        keep = len(edge.values) - num_blocks
        dropped = edge.values[: keep - 1 : -1]
        del edge.values[keep:]
        edge.key = edge.key[: keep * self.stride]
        self._lose(dropped)
        return dropped

    def remove(self, edge: Edge[V]) -> Edge[V]:
        """Take an edge without children out of the tree; returns its parent."""
        parent = edge.parent
        assert parent is not None
        assert not edge.children
        del parent.children[edge.key[: self.stride]]
        parent.num_beside -= parent.level == edge.level
        del self.orders[edge.level][edge]
        self._lose(edge.values)
        if parent.parent is None and not parent.children:
            del self.roots[parent.salt]
        return parent

    def drop(self, edges: list[Edge[V]]) -> list[V]:
        """Remove these edges, parents listed before their children; the values they held."""
        dropped: list[V] = []
        for edge in reversed(edges):
            dropped += edge.values
            self.remove(edge)
        return dropped

    def touch(self, edge: Edge[V]) -> None:
        """`edge` and all above it are used now."""
        self.orders[edge.level].move_to_end(edge)
        for step in edge.ancestors():
            if step.parent is not None:
                self.orders[step.level].move_to_end(step)

    def replace(self, edge: Edge[V], values: list[V]) -> None:
        """Let the blocks of `edge` have these values instead."""
        self._lose(edge.values)
        edge.values = values
        self.size += len(values)
        self._locate(edge, values)

    def set_level(self, edge: Edge[V], level: int) -> None:
        """Move an edge to another level, where it counts as used now; its parent must be touched."""
        assert edge.parent is not None
        assert level >= edge.parent.level
        edge.parent.num_beside += (level == edge.parent.level) - (edge.level == edge.parent.level)
        del self.orders[edge.level][edge]
        self.orders[level][edge] = None
        edge.level = level
        edge.num_beside = sum(child.level == level for child in edge.children.values())

    def join(self, edge: Edge[V]) -> None:
        """Let `edge` take in its only child, if it has just one and that is on the same level."""
        if edge.parent is None or len(edge.children) != 1 or not edge.num_beside:
            return
        (child,) = edge.children.values()
        del self.orders[child.level][child]
        edge.key += child.key
        edge.values += child.values
        edge.children, edge.num_beside = child.children, child.num_beside
        for grandchild in edge.children.values():
            grandchild.parent = edge
        self._locate(edge, child.values)

    def audit(self) -> list[str]:
        """Recount from scratch; what is wrong with the tree, in words."""
        problems = []
        places = [{edge: i for i, edge in enumerate(order)} for order in self.orders]
        edges = [edge for root in self.roots.values() for edge in root.subtree()]
        where = {value: edge for edge in edges for value in edge.values} if self._locating else {}
        size = sum(len(edge.values) for edge in edges)
        for edge in edges:
            place = places[edge.level].get(edge)
            if edge.parent is not None and place is None:
                problems.append("an edge is missing in the order of use")
            if len(edge.key) != len(edge.values) * self.stride or (edge.parent and not edge.values):
                problems.append("an edge's tokens and values disagree in number")
            for first, child in edge.children.items():
                if not child.key.startswith(first) or child.parent is not edge:
                    problems.append("an edge hangs in the wrong place")
                if child.level < edge.level:
                    problems.append("an edge hangs below one of a slower level")
                if place is not None and places[edge.level].get(child, -1) > place:
                    problems.append("an edge counts as used before what continues it")
            if edge.num_beside != sum(c.level == edge.level for c in edge.children.values()):
                problems.append("an edge miscounts its children")
        if where != self.edge_by_value:
            problems.append(f"{len(self.edge_by_value)} values located, {len(where)} held")
        if size != self.size:
            problems.append(f"{self.size} values counted, {size} held")
        num_ordered = sum(map(len, self.orders))
        if num_ordered != len(edges) - len(self.roots):
            problems.append(f"{num_ordered} edges ordered, {len(edges)} in the tree with its roots")
        if any(not root.children for root in self.roots.values()):
            problems.append("a salt without blocks is kept")
        return problems

    def _hang(self, edge: Edge[V]) -> None:
        assert edge.parent is not None
        edge.parent.children[edge.key[: self.stride]] = edge
        edge.parent.num_beside += edge.level == edge.parent.level

    def _locate(self, edge: Edge[V], values: list[V]) -> None:
        if self._locating:
            self.edge_by_value.update(dict.fromkeys(values, edge))

    def _lose(self, values: list[V]) -> None:
        self.size -= len(values)
        if self._locating:
            for value in values:
                del self.edge_by_value[value]
