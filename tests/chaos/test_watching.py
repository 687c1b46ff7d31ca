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
    growth_of,
    growths,
    holding_of,
    line_through,
    quarters_of,
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


def test_what_the_line_does_not_see_the_quarters_do() -> None:
    """The second quarter is high and the last one higher than the first: nearly level on the whole."""
    values = [100.0] * 26 + [140.0] * 20 + [100.0] * 20 + [120.0] * 20
    times = [7.0 + number * WARM_UP_S / 6 for number in range(len(values))]
    growth = growth_of("memory", [(times, values)], tolerated=16.0)
    assert growth.growth is not None
    assert growth.growth < 16.0
    assert growth.quarters == (100.0, 120.0)
    assert growth.most == 20.0
    assert growth.grows
    assert not growth_of("what is not judged", [(times, values)], tolerated=None).grows


def test_quarters_are_those_of_the_run_not_of_a_life() -> None:
    """A process that is followed by one that holds more."""
    lives = [
        ([start + number for number in range(200)], [level] * 200)
        for start, level in ((0.0, 50.0), (200.0, 90.0))
    ]
    assert quarters_of(lives) == (50.0, 90.0)


def test_a_run_too_short_to_tell_says_so() -> None:
    times = [0.0, *(WARM_UP_S + i for i in range(LEAST_SAMPLES - 1))]
    assert line_through([(times, times)])[1] is None
    assert quarters_of([(times, times)]) is None
    assert not growth_of("nothing", [(times, times)], 0.0).grows
    assert line_through([]) == (0.0, None)
    assert quarters_of([([], [])]) is None


@pytest.mark.parametrize(("leak", "grows"), [(0.0, False), (0.5, False), (2.0, True)])
def test_memory_may_grow_by_no_more_than_is_tolerated(leak: float, grows: bool) -> None:
    life = Life()
    for number in range(-10, 40):
        life.times.append(1000.0 + number * WARM_UP_S / 10)
        held = 50 + leak * TOLERATED_MIB * max(number, 0) / 39
        life.holdings.append(Holding(memory_mib=held, num_files=20, num_arenas=4))
    memory, files, arenas = growths("launcher", [life])
    assert memory.grows is grows
    assert not files.grows
    assert not arenas.grows
