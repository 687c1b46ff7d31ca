"""The word that tells how far a step is: it grows, wakes those who wait, and crosses processes."""

import mmap
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from memserve.pool.arena import Arena
from memserve.pool.header import PROGRESS_OFFSET
from memserve.pool.progress import NativeProgress, StepProgress, load_native_progress, word

from .peer import SMALL, native_blocks


def native_progress() -> NativeProgress:
    native = load_native_progress()
    assert native is not None, "these tests need a C compiler"
    return native


def test_later_steps_and_later_layers_count_more() -> None:
    reached = [word(1, 0), word(1, 1), word(1, 30), word(2, 0), word(2**40, 1)]
    assert reached == sorted(set(reached))


def test_a_model_of_too_many_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="65536 layers"):
        StepProgress(np.zeros(1, np.uint64), 1 << 16, native_progress())


def test_the_owner_counts_steps_and_layers() -> None:
    shared = np.zeros(1, np.uint64)
    progress = StepProgress(shared, 3, native_progress())
    assert progress.next_step == 1
    seen = []
    for _ in range(2):
        progress.begin()
        seen.append(int(shared[0]))
        progress.written(1)
        seen.append(int(shared[0]))
        progress.end()
        seen.append(int(shared[0]))
    assert seen == [word(1, 0), word(1, 1), word(1, 3), word(2, 0), word(2, 1), word(2, 3)]


def test_a_waiter_returns_when_the_word_has_grown_or_its_time_is_over() -> None:
    shared = np.zeros(1, np.uint64)
    native = native_progress()
    progress = StepProgress(shared, 3, native)
    address = int(shared.ctypes.data)
    assert native.wait(address, word(1, 1), 0.01) == 0
    progress.begin()
    results: list[int] = []

    def wait() -> None:
        reached = 0
        while reached < word(1, 2):
            reached = native.wait(address, word(1, 2), 20.0)
        results.append(reached)

    waiter = threading.Thread(target=wait)
    waiter.start()
    progress.written(1)
    assert not results
    progress.written(2)
    waiter.join(10)
    assert results == [word(1, 2)]


FOLLOWER = """
import mmap, sys
import numpy as np
from memserve.pool.progress import load_native_progress
mapping = mmap.mmap(int(sys.argv[1]), 4096, mmap.MAP_SHARED, mmap.PROT_READ)
shared = np.frombuffer(mapping, np.uint64, 1, int(sys.argv[2]))
native, reached = load_native_progress(), 0
print("waiting", flush=True)
while reached < int(sys.argv[3]):
    reached = native.wait(shared.ctypes.data, int(sys.argv[3]), 30.0)
print(reached)
"""


def test_another_process_waits_through_its_read_only_map() -> None:
    arena = Arena(SMALL, instance=1, epoch=1, native=native_blocks())
    progress = StepProgress(arena.progress_word, SMALL.num_layers, native_progress())
    arguments = [str(arena.fd), str(PROGRESS_OFFSET), str(word(1, 1))]
    with subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, *arguments],
        stdout=subprocess.PIPE,
        pass_fds=[arena.fd],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        progress.begin()
        progress.written(1)
        assert int(process.stdout.readline()) == word(1, 1)
    assert PROGRESS_OFFSET < mmap.PAGESIZE
    arena.close()
