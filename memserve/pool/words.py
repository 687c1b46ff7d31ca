"""The shared memory of an arena: its header, generations and words, and on a CPU its blocks.

Contract: the memory is present when it is made (no page fault and no out-of-memory later), can
neither grow nor shrink, and this process alone can ever write it: peers that get the file descriptor
map it read-only. Nothing has a name, so nothing is left behind, whatever kills the process.

It does not know what a block holds. No torch here.
"""

import fcntl
import mmap
import os
from typing import final

import numpy as np

from memserve.pool.generations import GenerationTable, NativeBlocks
from memserve.pool.header import (
    ALIVE_OFFSET,
    GENERATIONS_OFFSET,
    GROUP_SLOT_BYTES,
    GROUP_SLOTS_OFFSET,
    NUM_GROUP_SLOTS,
    PROGRESS_OFFSET,
    pack_header,
    total_bytes,
)
from memserve.pool.refs import ArenaDescriptor

F_SEAL_FUTURE_WRITE = 0x0010  # <linux/fcntl.h>; in Python's fcntl from 3.13 only
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


@final
class SharedWords:
    """`total_bytes(descriptor)` bytes behind `fd`, mapped at `map`.

    `generations` counts the contents of each block. `progress_word`, `group_slots` (one word each)
    and `alive_word` are for `memserve.pool.progress`. Raises OSError if the machine lacks the memory.
    """

    def __init__(self, descriptor: ArenaDescriptor, native: NativeBlocks | None) -> None:
        self.fd = os.memfd_create("memserve-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            self.map = _reserve(self.fd, total_bytes(descriptor))
        except OSError:
            os.close(self.fd)
            raise
        header = pack_header(descriptor)
        self.map[: len(header)] = header
        table = np.frombuffer(
            self.map, np.uint32, descriptor.layout.num_blocks, offset=GENERATIONS_OFFSET
        )
        self.generations = GenerationTable(table, native)
        words = np.frombuffer(self.map, np.uint64, count=GENERATIONS_OFFSET // 8)
        self.progress_word = words[PROGRESS_OFFSET // 8 :][:1]
        first, step = GROUP_SLOTS_OFFSET // 8, GROUP_SLOT_BYTES // 8
        self.group_slots = words[first : first + NUM_GROUP_SLOTS * step : step]
        self.alive_word = words[ALIVE_OFFSET // 8 :][:1]


def _reserve(fd: int, size: int) -> mmap.mmap:
    """Make `size` bytes of memory present behind `fd`, map them, and seal them."""
    os.posix_fallocate(fd, 0, size)
    mapping = mmap.mmap(
        fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE
    )
    # Sealed after our own writable mapping exists: no other can ever be made, here or elsewhere.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return mapping
