"""Counters go on over a worker's lives."""

from hypothesis import given
from hypothesis import strategies as st

from memserve.pool.refs import TierStats
from memserve.stats import DiskStats, EngineStats, add_up

TIER = TierStats(total=8, free=1, active=3, historical=4, in_flight=0)


def test_counters_add_up_and_gauges_are_of_now() -> None:
    former = EngineStats(num_running=3, num_steps=10, num_cached_tokens=7, hbm=TIER)
    now = EngineStats(num_waiting=2, num_steps=1, num_pulled_bytes=5)
    assert add_up(former, now) == EngineStats(
        num_waiting=2, num_steps=11, num_cached_tokens=7, num_pulled_bytes=5
    )


def test_files_are_counted_on_too() -> None:
    former = EngineStats(disk=DiskStats(num_read_blocks=4, num_bad_files=1))
    now = EngineStats(disk=DiskStats(num_read_blocks=1))
    assert add_up(former, now).disk == DiskStats(num_read_blocks=5, num_bad_files=1)
    assert add_up(EngineStats(), now).disk == now.disk
    assert add_up(former, EngineStats()).disk == former.disk


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_lives_add_up_in_any_number(lives: list[tuple[int, int]]) -> None:
    total = EngineStats()
    for num_steps, num_pulls in lives:
        total = add_up(total, EngineStats(num_steps=num_steps, num_pulls=num_pulls))
    assert total.num_steps == sum(steps for steps, _ in lives)
    assert total.num_pulls == sum(pulls for _, pulls in lives)
