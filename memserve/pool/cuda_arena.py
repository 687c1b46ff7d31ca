"""The HBM tier of one instance on a GPU: all KV blocks in one tensor in the GPU's own memory.

The same contract as `memserve.pool.arena`: a peer that gets the descriptors maps header and
generations read-only from the memfd, and the blocks by the handle in the descriptor. Other processes
of this user could write memory that was exported so; ours only read it.

The memory is given back when the process ends, not before: peers may have it mapped, and CUDA forbids
to free what others map. They are told to unmap it (`ReleasePeer`), and until they have, a dead
worker's memory stays taken.
"""

import logging
import os
from typing import final

from memserve.errors import OutOfDeviceMemory, UsageError
from memserve.pool.arena import block_tensor
from memserve.pool.cuda_runtime import Cuda
from memserve.pool.generations import NativeBlocks
from memserve.pool.refs import ArenaDescriptor, ArenaLayout, DeviceMemory, Tier
from memserve.pool.words import SharedWords

logger = logging.getLogger(__name__)


@final
class CudaArena:
    """KV blocks of one instance in HBM; the attributes are those of `Arena`.

    `tensor` and `address` are on the GPU. Raises UsageError, with what to lower, if it lacks the
    memory.
    """

    def __init__(
        self,
        layout: ArenaLayout,
        *,
        instance: int,
        epoch: int,
        native: NativeBlocks | None,
        cuda: Cuda,
    ) -> None:
        if layout.num_blocks < 1:
            raise UsageError(
                "the GPU's memory has no room for a single KV block beside the model: raise "
                "--gpu-memory-utilization or --kv-cache-memory, or start fewer workers"
            )
        size = layout.num_blocks * layout.block_bytes
        try:
            self.address = cuda.allocate(size)
        except OutOfDeviceMemory as error:
            raise UsageError(_too_little(cuda, size)) from error
        device = DeviceMemory(cuda.gpu, cuda.export(self.address), cuda.readable)
        self.descriptor = ArenaDescriptor(instance, epoch, int(Tier.HBM), layout, device)
        try:
            words = SharedWords(self.descriptor, native)
        except OSError as error:
            raise UsageError(f"too little memory for the tables of a KV cache: {error}") from error
        self.fd = words.fd
        self.generations = words.generations
        self.progress_word = words.progress_word
        self.group_slots = words.group_slots
        self.alive_word = words.alive_word
        self.tensor = block_tensor(cuda.tensor(self.address, size), layout)
        logger.info(
            "arena of %d blocks, %.2f GiB, on the GPU %s (instance %d, epoch %d)",
            *(layout.num_blocks, size / 2**30, cuda.gpu, instance, epoch),
        )

    @property
    def layout(self) -> ArenaLayout:
        """Shape and dtype of the blocks."""
        return self.descriptor.layout

    def close(self) -> None:
        """Let go of the arena; the process's end gives the GPU's memory back."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        del self.tensor, self.generations
        del self.progress_word, self.group_slots, self.alive_word


def _too_little(cuda: Cuda, size: int) -> str:
    free, total = cuda.memory()
    return (
        f"too little GPU memory: the KV blocks of one worker need {size / 2**30:.2f} GiB, but "
        f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB are free. Lower --gpu-memory-utilization, "
        "--kv-cache-memory or the number of workers."
    )
