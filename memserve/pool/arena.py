"""The memory of one tier of one instance: all KV blocks in one tensor over anonymous memory.

Contract: `memserve.pool.words` says what is promised of the memory. It does not know which blocks are
in use; that is `MemPool`. `memserve.pool.cuda_arena` is the same on a GPU.
"""

import logging
import os
from typing import Protocol, final

import torch

from memserve.errors import UsageError
from memserve.machine import available_memory
from memserve.pool.generations import GenerationTable, NativeBlocks
from memserve.pool.header import blocks_offset, total_bytes
from memserve.pool.progress import Words
from memserve.pool.refs import ArenaDescriptor, ArenaLayout, Tier
from memserve.pool.words import SharedWords

logger = logging.getLogger(__name__)

_FLAGS = {Tier.HBM: "--kv-cache-memory", Tier.DRAM: "--dram-cache-memory"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AnyArena(Protocol):
    """What an arena offers, whatever its memory; see `Arena`."""

    descriptor: ArenaDescriptor
    tensor: torch.Tensor
    fd: int
    address: int
    generations: GenerationTable
    progress_word: Words
    group_slots: Words
    alive_word: Words

    @property
    def layout(self) -> ArenaLayout:
        """Shape and dtype of the blocks."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


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
        rank: int = 0,
    ) -> None:
        self.descriptor = ArenaDescriptor(instance, epoch, int(tier), layout, rank=rank)
        if layout.num_blocks < 1:
            raise UsageError(f"{tier.name} has no room for a single block: raise {_FLAGS[tier]}")
        size = total_bytes(self.descriptor)
        _require_memory(size, tier)
        try:
            words = SharedWords(self.descriptor, native)
        except OSError as error:
            raise UsageError(_too_little(size, tier, str(error))) from error
        self.fd = words.fd
        self.generations = words.generations
        self.progress_word = words.progress_word
        self.group_slots = words.group_slots
        self.alive_word = words.alive_word
        blocks = torch.frombuffer(
            words.map,
            dtype=torch.uint8,
            offset=blocks_offset(layout),
            count=layout.num_blocks * layout.block_bytes,
        )
        self.tensor = block_tensor(blocks, layout)
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
        del self.tensor, self.generations
        del self.progress_word, self.group_slots, self.alive_word


def block_tensor(blocks: torch.Tensor, layout: ArenaLayout) -> torch.Tensor:
    """The bytes of all blocks, uint8 [num_blocks * block_bytes], as `Arena.tensor` says."""
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
