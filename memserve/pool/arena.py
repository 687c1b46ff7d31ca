"""The memory of one tier of one instance: all KV blocks in one tensor over anonymous memory.

Contract: the memory is present when the arena is made (no page fault and no out-of-memory later),
can neither grow nor shrink, and this process alone can ever write it: peers that get the descriptor
map it read-only. Nothing has a name, so nothing is left behind, whatever kills the process.

It does not know which blocks are in use; that is `MemPool`.
"""

import fcntl
import logging
import mmap
import os
from typing import final

import numpy as np
import torch

from memserve.errors import UsageError
from memserve.machine import available_memory
from memserve.pool.generations import GenerationTable, NativeBlocks
from memserve.pool.header import (
    ALIVE_OFFSET,
    GENERATIONS_OFFSET,
    GROUP_SLOT_BYTES,
    GROUP_SLOTS_OFFSET,
    NUM_GROUP_SLOTS,
    PROGRESS_OFFSET,
    blocks_offset,
    pack_header,
    total_bytes,
)
from memserve.pool.refs import ArenaDescriptor, ArenaLayout, Tier

logger = logging.getLogger(__name__)

F_SEAL_FUTURE_WRITE = 0x0010  # <linux/fcntl.h>; in Python's fcntl from 3.13 only
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL

_FLAGS = {Tier.HBM: "--kv-cache-memory", Tier.DRAM: "--dram-cache-memory"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@final
class Arena:
    """KV blocks of one instance and tier, readable by peers through `fd`.

    `tensor` is [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] of the layout's
    dtype, zero at first; K stands at index 0 of the third dimension, V at 1. If the layout's encoding
    is int8, it is uint8 [num_blocks, block_bytes] (see `memserve.pool.int8`). `generations` counts the
    contents of each block. `address` is where block 0 lies in this process. `progress_word`,
    `group_slots` (one word each) and `alive_word` are for `memserve.pool.progress`.

    Raises UsageError, with what to lower, if the machine lacks the memory.
    """

    def __init__(
        self,
        layout: ArenaLayout,
        *,
        instance: int,
        epoch: int,
        native: NativeBlocks | None,
        tier: Tier = Tier.HBM,
    ) -> None:
        self.descriptor = ArenaDescriptor(instance, epoch, int(tier), layout)
        if layout.num_blocks < 1:
            raise UsageError(f"{tier.name} has no room for a single block: raise {_FLAGS[tier]}")
        size = total_bytes(layout)
        _require_memory(size, tier)
        self.fd = os.memfd_create("memserve-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            self._map = _reserve(self.fd, size)
        except OSError as error:
            os.close(self.fd)
            raise UsageError(_too_little(size, tier, str(error))) from error
        header = pack_header(self.descriptor)
        self._map[: len(header)] = header
        blocks = torch.frombuffer(
            self._map,
            dtype=torch.uint8,
            offset=blocks_offset(layout),
            count=layout.num_blocks * layout.block_bytes,
        ).view(layout.num_blocks, layout.block_bytes)
        self.tensor: torch.Tensor = blocks
        if layout.encoding == "plain":
            values = blocks.view(_DTYPES[layout.dtype])
            self.tensor = values.view(layout.num_blocks, *layout.block_shape)
        table = np.frombuffer(
            self._map, dtype=np.uint32, count=layout.num_blocks, offset=GENERATIONS_OFFSET
        )
        self.generations = GenerationTable(table, native)
        self.progress_word = np.frombuffer(
            self._map, dtype=np.uint64, count=1, offset=PROGRESS_OFFSET
        )
        words = np.frombuffer(self._map, dtype=np.uint64, count=GENERATIONS_OFFSET // 8)
        first, step = GROUP_SLOTS_OFFSET // 8, GROUP_SLOT_BYTES // 8
        self.group_slots = words[first : first + NUM_GROUP_SLOTS * step : step]
        self.alive_word = words[ALIVE_OFFSET // 8 :][:1]
        self.address: int = self.tensor.data_ptr()
        logger.info(
            "arena of %d blocks, %.2f GiB (instance %d, epoch %d, tier %s, %s)",
            *(layout.num_blocks, size / 2**30, instance, epoch, tier.name, layout.encoding),
        )

    @property
    def layout(self) -> ArenaLayout:
        """Shape and dtype of the blocks."""
        return self.descriptor.layout

    def close(self) -> None:
        """Give the memory back, as soon as no tensor view of it is left; peers keep theirs."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        # The map goes with the last view of it that anybody holds. Closing it here would pull the
        # memory from under those views: a tensor made by `frombuffer` doesn't guard against that.
        del self.tensor, self.generations, self._map
        del self.progress_word, self.group_slots, self.alive_word


def _reserve(fd: int, size: int) -> mmap.mmap:
    """Make `size` bytes of memory present behind `fd`, map them, and seal them."""
    os.posix_fallocate(fd, 0, size)
    mapping = mmap.mmap(
        fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE
    )
    # Sealed after our own writable mapping exists: no other can ever be made, here or elsewhere.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return mapping


def _require_memory(size: int, tier: Tier) -> None:
    available = available_memory()
    if size > available:
        raise UsageError(_too_little(size, tier, f"{available / 2**30:.2f} GiB are available"))


def _too_little(size: int, tier: Tier, reason: str) -> str:
    return (
        f"too little memory: the KV blocks of one worker need {size / 2**30:.2f} GiB, but {reason}."
        f" Lower {_FLAGS[tier]} or the number of workers."
    )
