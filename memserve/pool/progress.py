"""How far the step that an instance is computing has come, layer by layer, for peers to read along.

One 64-bit word in the arena's shared memory: the number of the step, and for how many of its layers
K and V are in the arena. It only grows. The owner advances it with release semantics, so whoever sees
a layer counted sees that layer's bytes; a reader sleeps until the word has grown as far as it needs.

Only a step that somebody was told of is numbered: `begin` it after the announcement, call `written`
after each layer, and `end` it. Needs the compiled calls (`memserve/native/progress.c`). Which blocks a
step writes is no affair of this module, and a word says nothing about their generations.

Instances that prefill a prompt together (`memserve.parallel`) have slots of such words beside it:
group `number` has slot `number` modulo their count, and its word holds the number, the chunk and
its layers; a rank that was ready for a chunk may take that back. Another word grows with every sign
of life of the owner's engine.
"""

import ctypes
from functools import lru_cache
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from memserve.native.build import load_library
from memserve.pool.header import (
    ALIVE_OFFSET,
    GROUP_SLOT_BYTES,
    GROUP_SLOTS_OFFSET,
    NUM_GROUP_SLOTS,
)

LAYER_BITS = 16

Words: TypeAlias = npt.NDArray[np.uint64]


class NativeProgress:
    """The compiled calls. They release the GIL: a thread may wait beside the engine."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.store = library.memserve_store_progress
        self.store.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.store.restype = None
        self.wait = library.memserve_wait_for_progress
        self.wait.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_double]
        self.wait.restype = ctypes.c_uint64


@lru_cache(maxsize=1)
def load_native_progress() -> NativeProgress | None:
    """The compiled calls, or None where this machine has no working compiler (logged)."""
    library = load_library("progress", ["progress.c"], flags=["-std=gnu11"])
    return None if library is None else NativeProgress(library)


def word(step: int, num_layers: int) -> int:
    """The value of the word once `num_layers` layers of a step are written."""
    return step << LAYER_BITS | num_layers


@final
class StepProgress:
    """The owner's side: `shared` is the word, in its arena's memory."""

    def __init__(self, shared: Words, num_layers: int, native: NativeProgress) -> None:
        if num_layers >= 1 << LAYER_BITS:
            raise ValueError(f"{num_layers} layers can't be counted in {LAYER_BITS} bits")
        self._shared = shared  # keeps the memory mapped
        self._address = int(shared.ctypes.data)
        self._num_layers = num_layers
        self._native = native
        self._step = 0

    @property
    def next_step(self) -> int:
        """The number that the next step begun here gets; the first is 1."""
        return self._step + 1

    def begin(self) -> None:
        """The announced step starts: none of its layers is written."""
        self._step += 1
        self.written(0)

    def written(self, num_layers: int) -> None:
        """K and V of the step's first `num_layers` layers are in the arena."""
        self._native.store(self._address, word(self._step, num_layers))

    def end(self) -> None:
        """All of the step is written."""
        self.written(self._num_layers)


CHUNK_BITS = 16


def group_word(number: int, chunk: int, num_layers: int) -> int:
    """The value of a group's slot once its owner has written so many layers of a chunk.

    No layers: all chunks before it are written, and the owner is ready for this one. One less: they
    are written, and the owner works on this group, but is not ready.
    """
    return (number << CHUNK_BITS | chunk) << LAYER_BITS | num_layers


@final
class GroupProgress:
    """How far the groups have come that this instance takes part in, and how far others say they are.

    `slots` and `alive` are the owner's words; of a peer's arena, the address of its header is named.
    """

    def __init__(
        self,
        slots: Words,
        alive: Words,
        num_layers: int,
        native: NativeProgress,
    ) -> None:
        if num_layers >= 1 << LAYER_BITS:
            raise ValueError(f"{num_layers} layers can't be counted in {LAYER_BITS} bits")
        self._slots = slots
        self._address = int(slots.ctypes.data)
        self._alive = alive
        self._native = native

    def tell(self, number: int, chunk: int, num_layers: int) -> None:
        """All chunks before this one, and so many of its layers, are in the arena."""
        slot = self._address + number % NUM_GROUP_SLOTS * GROUP_SLOT_BYTES
        self._native.store(slot, group_word(number, chunk, num_layers))

    def hold_back(self, number: int, chunk: int) -> None:
        """All chunks before this one are in the arena; take back that the owner is ready for it."""
        slot = self._address + number % NUM_GROUP_SLOTS * GROUP_SLOT_BYTES
        self._native.store(slot, group_word(number, chunk, 0) - 1)

    def beat(self) -> None:
        """The engine runs."""
        self._alive[0] += np.uint64(1)

    def hear(self, header: int, number: int, wanted: int, seconds: float) -> int:
        """The word of a peer's slot for a group, as soon as it is `wanted` or after `seconds`."""
        slot = header + GROUP_SLOTS_OFFSET + number % NUM_GROUP_SLOTS * GROUP_SLOT_BYTES
        value: int = self._native.wait(slot, wanted, seconds)
        return value

    def life(self, header: int) -> int:
        """How many signs of life a peer has given."""
        value: int = self._native.wait(header + ALIVE_OFFSET, 0, 0.0)
        return value
