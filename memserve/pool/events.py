"""What an instance tells of its index, so that others know what it holds. No torch here.

Contract: the events of one instance, applied in order, give exactly its historical blocks. Blocks are
named by their number in the arena of their tier; a prefix is always held whole, so a new run of
blocks names the block that it continues instead of all tokens before it. A receiver that misses a
message (their numbers have a gap) asks for all of it again.
"""

from typing import TypeAlias

import msgspec


class Inserted(msgspec.Struct, frozen=True, array_like=True, tag="inserted"):
    """The index keeps these blocks from now on, one after the other."""

    salt: str
    parent: tuple[int, int] | None
    """(tier, block) that holds what comes right before; None: they start a prompt."""
    tokens: bytes
    """int32 tokens of these blocks, native byte order."""
    tier: int
    blocks: list[int]
    generations: list[int]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """The index has let go of these blocks; none that it still keeps continues them."""

    tier: int
    blocks: list[int]


class Moved(msgspec.Struct, frozen=True, array_like=True, tag="moved"):
    """`blocks[i]` of `tier` takes the place in the index of `sources[i]` of `source_tier`."""

    source_tier: int
    sources: list[int]
    tier: int
    blocks: list[int]
    generations: list[int]


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    """Nothing is held; what follows tells everything anew."""


IndexEvent: TypeAlias = Inserted | Removed | Moved | Cleared
