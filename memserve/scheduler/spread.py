"""Prompts whose KV lies spread over several instances, none of which holds it by itself.

A group has computed them, and nobody had the room to gather them. Their blocks are in no instance's
index, since no index knows what continues what elsewhere; so they are known here, by the ticket
under which the ranks keep them, until one of the ranks lets go of its part. Few, and large.
"""

from dataclasses import dataclass
from typing import final

from memserve.pool.index import TOKEN_BYTES
from memserve.pool.refs import BlockRef
from memserve.pool.tree import common_blocks


@dataclass(frozen=True, slots=True)
class SpreadPrefix:
    """What of a prompt is spread: its first blocks, in order, and where they are."""

    refs: list[BlockRef]

    @property
    def instances(self) -> set[int]:
        """The owners of these blocks."""
        return {ref.instance for ref in self.refs}


@dataclass(frozen=True, slots=True)
class _Entry:
    packed: bytes
    salt: str
    refs: list[BlockRef]


@final
class SpreadPrompts:
    """Spread prompts by ticket, in whole blocks of `block_size` tokens."""

    def __init__(self, block_size: int) -> None:
        self._stride = block_size * TOKEN_BYTES
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, ticket: int, packed: bytes, salt: str, refs: list[BlockRef]) -> list[int]:
        """Ranks keep a prompt; the tickets of those that it begins with, which are of no more use.

        `refs` has a block for each whole block of the prompt, or more.
        """
        num_blocks = min(len(packed) // self._stride, len(refs))
        packed = packed[: num_blocks * self._stride]
        covered = [
            number
            for number, entry in self._entries.items()
            if entry.salt == salt and packed.startswith(entry.packed)
        ]
        for number in covered:
            del self._entries[number]
        self._entries[ticket] = _Entry(packed, salt, refs[:num_blocks])
        return covered

    def remove(self, ticket: int) -> None:
        """It is not whole any more; unknown ones are ignored."""
        self._entries.pop(ticket, None)

    def longest(self, packed: bytes, salt: str) -> SpreadPrefix | None:
        """The longest prefix of a packed prompt that is spread."""
        best: list[BlockRef] = []
        for entry in self._entries.values():
            if entry.salt == salt:
                num = common_blocks(entry.packed, 0, packed, 0, self._stride)
                if num > len(best):
                    best = entry.refs[:num]
        return SpreadPrefix(best) if best else None
