"""Copies that every rank of an instance makes for its own heads, by the same block numbers.

A pulled block is good if the generation that rank 0 of its source counts still stands after the last
rank's copy: the source counts up before any of its ranks may write there. The other ranks' arenas
count no generations, so theirs need no look.
"""

from collections.abc import Callable, Sequence
from typing import final

from memserve.pool.refs import BlockRef, Tier
from memserve.pool.transfer import BlockMover, BlockReader
from memserve.pool.transfer.memfd import MemfdTransfer
from memserve.pool.transfer.tiers import TierCopy
from memserve.tensor.leading import Followers
from memserve.tensor.messages import Copy, Move, MoveWithin, Pull, PullLayer


@final
class EverywhereTransfer:
    """Reads blocks of another instance's ranks into this one's, each rank its own."""

    def __init__(self, own: MemfdTransfer, followers: Followers) -> None:
        self._own = own
        self._followers = followers

    @property
    def needs_lease(self) -> bool:
        """See `MemfdTransfer`, as for all that follows."""
        return self._own.needs_lease

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one rank."""
        return self._own.block_bytes

    @property
    def num_layers(self) -> int:
        """Layers of a block."""
        return self._own.num_layers

    def read(
        self,
        refs: Sequence[BlockRef],
        into: Sequence[int],
        *,
        leased: bool = False,
        tier: Tier = Tier.HBM,
    ) -> list[bool]:
        """True for each block that all ranks have copied whole."""
        return self._everywhere(
            Pull(_uncounted(refs), list(into), tier),
            lambda: self._own.read(refs, into, leased=leased, tier=tier),
            refs,
        )

    def read_layer(self, refs: Sequence[BlockRef], into: Sequence[int], layer: int) -> list[bool]:
        """The same of one layer."""
        return self._everywhere(
            PullLayer(_uncounted(refs), list(into), layer),
            lambda: self._own.read_layer(refs, into, layer),
            refs,
        )

    def wait_for_layer(self, ref: BlockRef, step: int, layer: int, *, seconds: float) -> bool:
        """Until all ranks of the block's owner have written a layer."""
        return self._own.wait_for_layer(ref, step, layer, seconds=seconds)

    def _everywhere(
        self, message: Copy, own: Callable[[], list[bool]], refs: Sequence[BlockRef]
    ) -> list[bool]:
        verified, good = self._followers.copy(message, own)
        if not good:
            return [False] * len(refs)
        # Looked at again: the own copy may have ended before another rank's.
        still = self._own.hold(refs)
        return [a and b for a, b in zip(verified, still, strict=True)]


@final
class EverywhereTiers:
    """Copies between tiers, or within HBM, on all ranks."""

    def __init__(self, own: TierCopy, followers: Followers, *, within: bool = False) -> None:
        self._own = own
        self._followers = followers
        self._within = within

    def copy(self, sources: Sequence[int], destinations: Sequence[int], to: Tier) -> None:
        """See `TierCopy.copy`."""
        places = list(sources), list(destinations)
        message = MoveWithin(*places) if self._within else Move(*places, to)
        self._followers.copy(message, lambda: self._own.copy(sources, destinations, to))


def everywhere(
    transfer: MemfdTransfer, tiers: TierCopy | None, within: TierCopy, followers: Followers | None
) -> tuple[BlockReader, BlockMover | None, BlockMover]:
    """What copies between instances, between tiers and within HBM, on all ranks if there are others."""
    if followers is None:
        return transfer, tiers, within
    return (
        EverywhereTransfer(transfer, followers),
        None if tiers is None else EverywhereTiers(tiers, followers),
        EverywhereTiers(within, followers, within=True),
    )


def _uncounted(refs: Sequence[BlockRef]) -> list[BlockRef]:
    """The same blocks on ranks that count no generations."""
    return [BlockRef(ref.instance, ref.epoch, ref.tier, ref.block, 0) for ref in refs]
