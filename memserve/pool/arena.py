"""The memory of one tier of one instance: all KV blocks in one tensor over anonymous memory.

Contract: `memserve.pool.words` says what is promised of the memory. It does not know which blocks are
in use; that is `MemPool`. `memserve.pool.cuda_arena` is the same on a GPU.
"""

import logging
import os
from typing import final

import torch

from memserve.errors import UsageError
from memserve.machine import available_memory
from memserve.pool.generations import NativeBlocks
from memserve.pool.header import blocks_offset, total_bytes
from memserve.pool.refs import ArenaDescriptor, ArenaLayout, KVDType, Tier
from memserve.pool.words import SharedWords

logger = logging.getLogger(__name__)

_FLAGS = {Tier.HBM: "--kv-cache-memory", Tier.DRAM: "--dram-cache-memory"}
_DTYPES: dict[KVDType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class AnyArena:
    """KV blocks of one instance and tier, whatever their memory; readable by peers through `fd`.

    `tensor` is [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] of the layout's
    dtype, zero at first; K stands at index 0 of the third dimension, V at 1. If the layout's encoding
    is int8, it is uint8 [num_blocks, block_bytes] (see `memserve.pool.int8`). `generations` counts the
    contents of each block. `address` is where block 0 lies for this process. `progress_word`,
    `group_slots` (one word each) and `alive_word` are for `memserve.pool.progress`.
    """

    def __init__(
        self, descriptor: ArenaDescriptor, words: SharedWords, blocks: torch.Tensor, address: int
    ) -> None:
        """`blocks`: the bytes of all of them, uint8 [num_blocks * block_bytes]."""
        self.descriptor = descriptor
        self.fd = words.fd
        self.generations = words.generations
        self.progress_word = words.progress_word
        self.group_slots = words.group_slots
        self.alive_word = words.alive_word
        self.tensor = block_tensor(blocks, descriptor.layout)
        self.address = address

    @property
    def layout(self) -> ArenaLayout:
        """Shape and dtype of the blocks."""
        return self.descriptor.layout

    def close(self) -> None:
        """Give up the memory, as soon as no tensor view of it is left; peers keep theirs."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        # The map goes with the last view of it that anybody holds. Closing it here would pull the
        # memory from under those views: a tensor made by `frombuffer` doesn't guard against that.
        del self.tensor, self.generations
        del self.progress_word, self.group_slots, self.alive_word


@final
class Arena(AnyArena):
    """Blocks in host memory. Raises UsageError, with what to lower, if the machine lacks it."""

    def __init__(
        self,
        layout: ArenaLayout,
        *,
        instance: int,
        epoch: int,
        native: NativeBlocks | None,
        tier: Tier = Tier.HBM,
        rank: int = 0,
    ) -> None:
        descriptor = ArenaDescriptor(instance, epoch, int(tier), layout, rank=rank)
        if layout.num_blocks < 1:
            raise UsageError(f"{tier.name} has no room for a single block: raise {_FLAGS[tier]}")
        size = total_bytes(descriptor)
        _require_memory(size, tier)
        try:
            words = SharedWords(descriptor, native)
        except OSError as error:
            raise UsageError(_too_little(size, tier, str(error))) from error
        blocks = torch.frombuffer(
            words.map,
            dtype=torch.uint8,
            offset=blocks_offset(layout),
            count=layout.num_blocks * layout.block_bytes,
        )
        super().__init__(descriptor, words, blocks, blocks.data_ptr())
        logger.info(
            "arena of %d blocks, %.2f GiB (instance %d, epoch %d, tier %s, %s)",
            *(layout.num_blocks, size / 2**30, instance, epoch, tier.name, layout.encoding),
        )


def block_tensor(blocks: torch.Tensor, layout: ArenaLayout) -> torch.Tensor:
    """The bytes of all blocks, uint8 [num_blocks * block_bytes], as `AnyArena.tensor` says."""
    blocks = blocks.view(layout.num_blocks, layout.block_bytes)
    if layout.encoding != "plain":
        return blocks
    return blocks.view(_DTYPES[layout.dtype]).view(layout.num_blocks, *layout.block_shape)


def _require_memory(size: int, tier: Tier) -> None:
    available = available_memory()
    if size > available:
        raise UsageError(_too_little(size, tier, f"{available / 2**30:.2f} GiB are available"))


def _too_little(size: int, tier: Tier, reason: str) -> str:
    return (
        f"too little memory: the KV blocks of one worker need {size / 2**30:.2f} GiB, but {reason}."
        f" Lower {_FLAGS[tier]} or the number of workers."
    )
