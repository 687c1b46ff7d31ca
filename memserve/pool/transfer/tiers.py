"""Copies between the tiers of one instance: the bytes of a `Swap`.

Both ends are kept from reuse by the swap, so nothing is verified. Where DRAM keeps int8, blocks are
converted on the way. No torch here.
"""

import ctypes
from collections.abc import Sequence
from typing import final

import numpy as np

from memserve.pool.generations import NativeBlocks
from memserve.pool.int8 import convert_blocks
from memserve.pool.refs import Tier
from memserve.pool.transfer.memfd import LocalArena


@final
class TierCopy:
    """Copies blocks between the HBM and the DRAM arena; may run on a copy thread."""

    def __init__(self, hbm: LocalArena, dram: LocalArena, native: NativeBlocks | None) -> None:
        self._hbm = hbm
        self._dram = dram
        self._native = native

    def copy(self, sources: Sequence[int], destinations: Sequence[int], to: Tier) -> None:
        """Copy the other tier's `sources[i]` to `destinations[i]` of tier `to`; arena numbers."""
        source, destination = self._hbm, self._dram
        if to is Tier.HBM:
            source, destination = destination, source
        if source.descriptor.layout.encoding != destination.descriptor.layout.encoding:
            convert_blocks(self._native, source, sources, destination, destinations)
            return
        block_bytes = source.descriptor.layout.block_bytes
        if self._native is not None:
            self._native.move(
                destination.address,
                np.array(destinations, dtype=np.int64),
                source.address,
                np.array(sources, dtype=np.int64),
                block_bytes,
            )
            return
        for block, into in zip(sources, destinations, strict=True):
            ctypes.memmove(
                destination.address + into * block_bytes,
                source.address + block * block_bytes,
                block_bytes,
            )
