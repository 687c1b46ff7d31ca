"""Puts faults around a worker: its copies, its files, its link."""

import ctypes
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from memserve.pool.disk import BlockFiles, Content
from memserve.pool.pending import Swap
from memserve.pool.refs import BlockRef, Tier
from memserve.pool.transfer import BlockMover, BlockReader
from memserve.workers.copying import Copier
from memserve.workers.link import Event, Link
from memserve.workers.memory import WorkerMemory
from tests.faults.plan import Action, Fault, Faults

GARBAGE = 0xA5


def wrap(memory: WorkerMemory, faults: Faults) -> None:
    """From now on a worker's copies and files meet these faults."""
    memory.copier = FaultyCopier(memory.copier, memory, faults)
    if memory.store is not None:
        memory.store._files = FaultyFiles(memory.store._files, faults)


class FaultyCopier(Copier):
    """Takes the place of another copier that has not copied yet."""

    def __init__(self, copier: Copier, memory: WorkerMemory, faults: Faults) -> None:
        self.__dict__.update(copier.__dict__)
        self._place = threading.local()
        self._faults = faults
        self._transfer = FaultyTransfer(copier._transfer, memory, self._meet)
        if copier._tiers is not None:
            self._tiers = FaultyTierCopy(copier._tiers, self._meet)

    @contextmanager
    def _at(self, place: str) -> Iterator[None]:
        self._place.name = place
        yield

    def _meet(self) -> Fault | None:
        return self._faults.meet(self._place.name)

    def _copy(self, *args: Any, **kwargs: Any) -> None:
        with self._at("handover"):
            super()._copy(*args, **kwargs)

    def _follow(self, *args: Any, **kwargs: Any) -> None:
        with self._at("layer"):
            super()._follow(*args, **kwargs)

    def _pull(self, *args: Any, **kwargs: Any) -> None:
        with self._at("pull"):
            super()._pull(*args, **kwargs)

    def _fetch(self, *args: Any, **kwargs: Any) -> None:
        with self._at("fetch"):
            super()._fetch(*args, **kwargs)

    def _swap(self, swap: Swap) -> None:
        with self._at("swap out" if swap.to is Tier.DRAM else "swap in"):
            super()._swap(swap)


class FaultyTransfer:
    """In the place of a `MemfdTransfer`."""

    def __init__(
        self, transfer: BlockReader, memory: WorkerMemory, meet: Callable[[], Fault | None]
    ) -> None:
        self._inner = transfer
        self._memory = memory
        self._meet = meet
        self.needs_lease = transfer.needs_lease
        self.block_bytes = transfer.block_bytes
        self.num_layers = transfer.num_layers

    def read(
        self, refs: Sequence[BlockRef], into: Sequence[int], *, leased: bool, tier: Tier
    ) -> list[bool]:
        fault = self._meet()
        if fault is None or fault.action is not Action.TEAR:
            return self._inner.read(refs, into, leased=leased, tier=tier)
        num_good = len(refs) // 2
        verified = self._inner.read(refs[:num_good], into[:num_good], leased=leased, tier=tier)
        self._spoil(into[num_good], tier)
        return verified + [False] * (len(refs) - num_good)

    def read_layer(self, refs: Sequence[BlockRef], into: Sequence[int], layer: int) -> list[bool]:
        fault = self._meet()
        if fault is None or fault.action is not Action.TEAR:
            return self._inner.read_layer(refs, into, layer)
        self._spoil(into[0], Tier.HBM)
        return [False] * len(refs)

    def wait_for_layer(self, ref: BlockRef, step: int, layer: int, *, seconds: float) -> bool:
        return self._inner.wait_for_layer(ref, step, layer, seconds=seconds)

    def _spoil(self, block: int, tier: Tier) -> None:
        """Half of a block is written."""
        arena = self._memory.hbm if tier is Tier.HBM else self._memory.dram
        assert arena is not None
        num_bytes = arena.layout.block_bytes
        ctypes.memset(arena.address + block * num_bytes, GARBAGE, num_bytes // 2)


class FaultyTierCopy:
    """In the place of a `TierCopy`."""

    def __init__(self, tiers: BlockMover, meet: Callable[[], Fault | None]) -> None:
        self._inner = tiers
        self._meet = meet

    def copy(self, sources: Sequence[int], destinations: Sequence[int], to: Tier) -> None:
        self._meet()
        self._inner.copy(sources, destinations, to)


class FaultyFiles(BlockFiles):  # type: ignore[misc]  # final for the product
    """Takes the place of other files; what goes wrong, the disk itself does."""

    def __init__(self, files: BlockFiles, faults: Faults) -> None:
        self.__dict__.update(files.__dict__)
        self._faults = faults

    def _read(self, file: int, content: Content, into: memoryview) -> str | None:
        fault = self._faults.meet("file read")
        if fault is None or fault.action is not Action.TEAR:
            return super()._read(file, content, into)
        into[: len(into) // 2] = bytes([GARBAGE]) * (len(into) // 2)
        return "it is torn"

    def _write(self, path: str, content: Content, payload: bytes | memoryview) -> None:
        fault = self._faults.meet("file write")
        super()._write(path, content, payload)
        if fault is not None and fault.action is Action.TEAR:
            os.truncate(path, os.path.getsize(path) - 1)


class FaultyInbox(queue.SimpleQueue[Event]):
    """An inbox on whose way messages get lost, late or doubled."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._mishaps = Mishaps("to", faults)

    def put(self, item: Event, block: bool = True, timeout: float | None = None) -> None:
        self._mishaps.hand_on(item, super().put)


class FaultyLink(Link):
    """A link with the same on both ways."""

    def __init__(self, control: Any, faults: Faults) -> None:
        super().__init__(control)
        self.inbox = FaultyInbox(faults)
        self.receive = self.inbox.put
        self._mishaps = Mishaps("from", faults)

    def send(self, message: msgspec.Struct) -> None:
        self._mishaps.hand_on(message, super().send)


class Mishaps:
    """What happens to the messages of one direction."""

    def __init__(self, direction: str, faults: Faults) -> None:
        self._direction = direction
        self._faults = faults
        self._overtaken: list[Callable[[], None]] = []

    def hand_on(self, message: Any, deliver: Callable[[Any], None]) -> None:
        fault = self._faults.meet(f"{self._direction} {type(message).__name__}")
        overtaken, self._overtaken = self._overtaken, []
        match fault.action if fault is not None else None:
            case Action.DROP:
                pass
            case Action.HOLD:
                self._faults.keep(lambda: deliver(message))
            case Action.LATER:
                self._overtaken.append(lambda: deliver(message))
            case Action.TWICE:
                deliver(message)
                deliver(message)
            case _:
                deliver(message)
        for late in overtaken:
            late()
