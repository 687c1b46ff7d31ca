"""Memory, files and pages of processes, and when they are said to grow."""

import mmap
import os
import tempfile

import pytest

from memserve.chaos.watching import (
    LEAST_SAMPLES,
    TOLERATED_MIB,
    WARM_UP_S,
    Holding,
    Life,
    growths,
    holding_of,
    line_through,
)


def test_a_process_is_seen_to_hold_memory_and_files() -> None:
    before = holding_of(os.getpid())
    with mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE) as memory, tempfile.TemporaryFile():
        memory[:] = b"x" * len(memory)
        after = holding_of(os.getpid())
    assert after.memory_mib - before.memory_mib > 30
    assert after.num_files == before.num_files + 1


def test_a_process_that_has_gone_is_no_sample() -> None:
    life = Life()
    life.look(2**22 + 1)  # above the largest process id of Linux
    assert life.holdings == []


def test_the_slope_is_that_of_all_lives_whatever_their_levels_and_beginnings() -> None:
    times = [10.0 * i for i in range(30)]
    series = []
    for level in (100.0, 500.0):
        values = [level + 0.5 * at if at >= WARM_UP_S else 0.0 for at in times]
        series.append((times, values))
    mean, growth = line_through(series)
    assert 100 < mean < 500
    assert growth == pytest.approx(0.5 * (times[-1] - WARM_UP_S))


def test_a_run_too_short_to_tell_says_so() -> None:
    times = [WARM_UP_S + i for i in range(LEAST_SAMPLES - 1)]
    mean, growth = line_through([(times, times)])
    assert mean == pytest.approx(WARM_UP_S + 9)
    assert growth is None
    assert line_through([]) == (0.0, None)


@pytest.mark.parametrize(("leak", "grows"), [(0.0, False), (0.5, False), (2.0, True)])
def test_memory_may_grow_by_no_more_than_is_tolerated(leak: float, grows: bool) -> None:
    life = Life()
    for number in range(40):
        life.times.append(WARM_UP_S + number)
        held = 50 + leak * TOLERATED_MIB * number / 39
        life.holdings.append(Holding(memory_mib=held, num_files=20, num_arenas=4))
    memory, files, arenas = growths("launcher", [life])
    assert memory.grows is grows
    assert not files.grows
    assert not arenas.grows
