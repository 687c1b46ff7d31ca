"""What the ranks of an instance compute together, and where they meet for it.

On a CPU they share memory (`memserve.tensor.shared`). `TorchRanks` does the same by torch.distributed:
by gloo where nothing can be compiled, and the way for other devices, which need another backend's
name and tensors on the device. A rank that dies fails the others' calls; that is the instance's
death.

The ranks meet at a file without a name that all have inherited, so nothing is left behind. Of gloo,
sockets on the loopback interface stand open.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from memserve.model.shard import Collective
from memserve.pool.progress import load_native_progress
from memserve.tensor.shared import SharedRanks, reserve

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
"""For the others to come to a call: one may read its weights for long. While an instance serves, the
launcher gives it up long before."""

Means = Literal["shared memory", "gloo"]


@final
class TorchRanks:
    """The processes of one instance; a `memserve.model.shard.Collective`."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size

    @property
    def rank(self) -> int:
        """Own number, from 0 on."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on every rank, in place where the tensor is contiguous."""
        partial = partial.contiguous()
        if partial.numel():
            dist.all_reduce(partial)
        return partial

    def gather_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """All ranks' [..., n] side by side on rank 0, [..., n * size]; elsewhere what was given."""
        columns = columns.contiguous()
        if not columns.numel():
            return columns.new_empty(*columns.shape[:-1], columns.shape[-1] * self._size)
        if self._rank:
            dist.gather(columns)
            return columns
        parts = [torch.empty_like(columns) for _ in range(self._size)]
        dist.gather(columns, parts)
        return torch.cat(parts, dim=-1)


@contextmanager
def meeting(
    meeting_point: int,
    rank: int,
    size: int,
    means: Means,
    *,
    anyone_gone: Callable[[], bool] = lambda: False,
) -> Iterator[Collective]:
    """Meet the other ranks at a file, by its descriptor, the same for all; then compute together.

    With shared memory, rank 0 has reserved it there. `anyone_gone` is asked while others are awaited.
    """
    if means == "shared memory":
        native = load_native_progress()
        assert native is not None
        yield SharedRanks(meeting_point, rank, size, native, anyone_gone=anyone_gone)
        return
    store = FileStore(f"/proc/self/fd/{meeting_point}", size)
    dist.init_process_group(means, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield TorchRanks(rank, size)
    finally:
        dist.destroy_process_group()


def choose_means(meeting_point: int, size: int) -> Means:
    """Rank 0 chooses, and prepares the meeting point."""
    if load_native_progress() is None:
        logger.warning("no C compiler: the ranks' sums go through sockets, slower")
        return "gloo"
    reserve(meeting_point, size)
    return "shared memory"
