"""How blocks get from one instance's arena into another's: pulled by the receiver, one-sided.

One backend per kind of memory, behind one protocol. A backend moves bytes and verifies that they
are the content the reference names; allocation, pinning and leases are its callers' affair.
"""

from collections.abc import Sequence
from typing import Protocol

from memserve.pool.refs import ArenaDescriptor, BlockRef, Tier


class Transfer(Protocol):
    """Reads blocks of peers' arenas into the local one.

    `read` may run on a copy thread while the main loop calls `map` and `release`.
    """

    @property
    def needs_lease(self) -> bool:
        """Whether `read` must be told that the owner can't reuse the blocks meanwhile."""
        ...

    def export(self) -> tuple[ArenaDescriptor, int]:
        """The local arena's descriptor and file descriptor, for peers; the latter stays ours."""
        ...

    def map(self, descriptor: ArenaDescriptor, fd: int) -> None:
        """Make a peer's arena readable. `fd` stays the caller's, who may close it afterwards.

        An earlier life of the same instance is released. Raises PoolError if this memory isn't the
        arena described or its blocks have another shape, StaleReference if it is of another epoch
        or a later life is mapped already.
        """
        ...

    def read(
        self,
        refs: Sequence[BlockRef],
        into: Sequence[int],
        *,
        leased: bool = False,
        tier: Tier = Tier.HBM,
    ) -> list[bool]:
        """Copy the block that `refs[i]` names into block `into[i]` of the local arena of `tier`.

        Returns for each whether it held the named generation before and after its copy; where not,
        the local block holds bytes of no meaning. `leased` promises that the owners keep these
        blocks until the call returns. Raises StaleReference, before a byte is touched, if a
        reference names an instance, epoch or block that is not mapped.
        """
        ...

    def read_layer(self, refs: Sequence[BlockRef], into: Sequence[int], layer: int) -> list[bool]:
        """Like `read` of HBM blocks without a lease, but K and V of one layer only.

        A local block is whole once every layer was read and each time True returned.
        """
        ...

    def wait_for_layer(self, ref: BlockRef, step: int, layer: int, *, seconds: float) -> bool:
        """Sleep until the owner of `ref` has written a layer in a step (`memserve.pool.progress`).

        False after `seconds`, or earlier. Raises StaleReference as `read` does.
        """
        ...

    def release(self, instance: int) -> None:
        """Forget this instance's arenas; a read in progress keeps its own until it is done."""
        ...


class BlockReader(Protocol):
    """What reads other instances' blocks; `Transfer` says how."""

    @property
    def needs_lease(self) -> bool:
        """Whether the owners must keep the blocks meanwhile."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of a block."""
        ...

    def read(
        self, refs: Sequence[BlockRef], into: Sequence[int], *, leased: bool, tier: Tier
    ) -> list[bool]:
        """Copy blocks; which of them are what the references name."""
        ...

    def read_layer(self, refs: Sequence[BlockRef], into: Sequence[int], layer: int) -> list[bool]:
        """Copy one layer of them."""
        ...

    def wait_for_layer(self, ref: BlockRef, step: int, layer: int, *, seconds: float) -> bool:
        """Whether the owner has written a layer within that time."""
        ...


class BlockMover(Protocol):
    """What copies between an instance's own tiers, as `TierCopy` does."""

    def copy(self, sources: Sequence[int], destinations: Sequence[int], to: Tier) -> None:
        """Copy the other tier's `sources[i]` to `destinations[i]` of tier `to`."""
        ...
