"""A GPU in host memory: addresses, IPC and streams as `Cuda` has them, as unkind as a GPU may be.

What a stream is given happens when it is waited for, not before, and the blocks of a gather in any
order. Memory is a memfd, so that another process can open it by the handle for as long as its owner
lives, and keeps it when the owner has died.
"""

import ctypes
import mmap
import os
import random
import struct
from collections import Counter
from collections.abc import Callable

import torch

from memserve.errors import DeviceError, OutOfDeviceMemory, PoolError
from memserve.pool.cuda_runtime import HANDLE_BYTES, Gather
from memserve.pool.refs import DeviceMemory

_HANDLE = struct.Struct("<qqqQ")  # process, file descriptor, bytes, inode
GONE = "cudaIpcOpenMemHandle: invalid argument (CUDA error 1)"


class FakeCuda:
    """`memory_bytes` of memory; `on_wait` is called by a stream halfway through what it does late."""

    def __init__(
        self, gpu: str = "GPU-0", *, peers: tuple[str, ...] = (), memory_bytes: int = 1 << 30
    ) -> None:
        self.gpu = gpu
        self.readable = (gpu, *peers)
        self.on_wait: Callable[[], None] | None = None
        self.num_open: Counter[int] = Counter()
        self.pinned: list[tuple[int, int]] = []
        self.launches: list[Gather] = []
        self.num_copies = 0
        self._maps: dict[int, mmap.mmap] = {}
        self._files: dict[int, tuple[int, int]] = {}
        self._free_bytes = self._memory_bytes = memory_bytes

    def allocate(self, num_bytes: int) -> int:
        if num_bytes > self._free_bytes:
            raise OutOfDeviceMemory("cudaMalloc: out of memory (CUDA error 2)")
        self._free_bytes -= num_bytes
        file = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(file, num_bytes)
        address = self._map(file, num_bytes)
        self._files[address] = (file, num_bytes)
        return address

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.frombuffer(self._maps[address], dtype=torch.uint8, count=num_bytes)

    def export(self, address: int) -> bytes:
        file, num_bytes = self._files[address]
        handle = _HANDLE.pack(os.getpid(), file, num_bytes, os.fstat(file).st_ino)
        return handle.ljust(HANDLE_BYTES, b"\0")

    def open(self, memory: DeviceMemory) -> int:
        if memory.gpu not in self.readable:
            raise PoolError(f"{self.gpu} can't read memory of {memory.gpu}")
        pid, number, num_bytes, inode = _HANDLE.unpack_from(memory.handle)
        try:
            file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        except OSError as error:
            raise DeviceError(GONE) from error
        try:
            if os.fstat(file).st_ino != inode:
                raise DeviceError(GONE)
            address = self._map(file, num_bytes)
        finally:
            os.close(file)
        self.num_open[address] += 1
        return address

    def close(self, address: int) -> None:
        self.num_open[address] -= 1
        if self._maps:  # else the process has ended, and with it all maps
            del self._maps[address]

    def pin(self, address: int, num_bytes: int) -> None:
        self.pinned.append((address, num_bytes))

    def stream(self) -> "FakeStream":
        return FakeStream(self)

    def memory(self) -> tuple[int, int]:
        return self._free_bytes, self._memory_bytes

    def shut_down(self) -> None:
        """The process ends."""
        for file, _ in self._files.values():
            os.close(file)
        self._files.clear()
        self._maps.clear()

    def _map(self, file: int, num_bytes: int) -> int:
        mapping = mmap.mmap(file, num_bytes, mmap.MAP_SHARED)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._maps[address] = mapping
        return address


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._given: list[list[tuple[int, int, int]]] = []  # what comes later, later
        self._shuffle = random.Random(0).shuffle

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        self._cuda.num_copies += 1
        self._given.append([(destination, source, num_bytes)])

    def gather(self, work: Gather) -> None:
        self._cuda.launches.append(work)
        pieces = [
            (
                work.destination + int(place) * work.block_bytes + work.offset,
                work.source + int(block) * work.block_bytes + work.offset,
                work.num_bytes,
            )
            for block, place in zip(work.blocks, work.into, strict=True)
        ]
        self._given.append(pieces)

    def wait(self) -> None:
        given, self._given = self._given, []
        for pieces in given:
            self._shuffle(pieces)
            for destination, source, num_bytes in pieces:
                half = num_bytes // 2
                ctypes.memmove(destination, source, half)
                if self._cuda.on_wait is not None:
                    self._cuda.on_wait()
                ctypes.memmove(destination + half, source + half, num_bytes - half)
