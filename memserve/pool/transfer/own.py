"""Copies out of an own arena on another thread, while the thread that owns the pool goes on.

The same two looks at the generation as for a peer's arena, so nobody needs to keep a block from reuse
meanwhile. Without the compiled copy, Python's lock orders the looks and the copy: the owner counts up
under that lock before it may write. No torch here.
"""

import ctypes
from typing import Protocol, final

import numpy as np

from memserve.pool.generations import GenerationTable, NativeBlocks
from memserve.pool.refs import ArenaDescriptor


class OwnArena(Protocol):
    """What must be known of the arena."""

    descriptor: ArenaDescriptor
    generations: GenerationTable
    address: int


@final
class OwnCopy:
    """Reads blocks of one arena into a buffer, for one thread."""

    def __init__(self, arena: OwnArena, native: NativeBlocks | None) -> None:
        self._arena = arena
        self._native = native
        self._num_bytes = arena.descriptor.layout.block_bytes
        self._buffer = np.empty(self._num_bytes, np.uint8)

    def read(self, block: int, generation: int) -> memoryview | None:
        """The bytes of a block, good until the next call; None if it has lost that content."""
        if self._native is None:
            return self._read(block, generation)
        (copied,) = self._native.copy(
            int(self._buffer.ctypes.data),
            np.zeros(1, np.int64),
            self._arena.address,
            np.array([block], np.int64),
            self._arena.generations.address,
            np.array([generation], np.uint32),
            self._num_bytes,
            self._num_bytes,
        )
        return self._buffer.data if copied else None

    def _read(self, block: int, generation: int) -> memoryview | None:
        generations = self._arena.generations
        if generations.load([block]) != [generation]:
            return None
        source = self._arena.address + block * self._num_bytes
        ctypes.memmove(int(self._buffer.ctypes.data), source, self._num_bytes)
        return self._buffer.data if generations.load([block]) == [generation] else None
