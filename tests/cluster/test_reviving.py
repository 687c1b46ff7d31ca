"""When a worker that has died is started again."""

from memserve.cluster.reviving import (
    FIRST_WAIT_S,
    HEALTHY_S,
    LONGEST_WAIT_S,
    MAX_DEATHS,
    WINDOW_S,
    Deaths,
)


def test_each_death_in_a_row_doubles_the_wait_up_to_a_limit() -> None:
    deaths, waits, now = Deaths(), [], 0.0
    for _ in range(10):
        deaths.started(now)
        now += HEALTHY_S - 1
        deaths.died(now)
        waits.append(deaths.wait())
        now += WINDOW_S / MAX_DEATHS
    assert waits[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert waits[-1] == LONGEST_WAIT_S


def test_health_forgets_the_deaths_in_a_row() -> None:
    deaths = Deaths()
    for now in (0.0, 10.0):
        deaths.started(now)
        deaths.died(now + 1)
    assert deaths.wait() == 2 * FIRST_WAIT_S
    deaths.started(20.0)
    deaths.died(20.0 + HEALTHY_S)
    assert deaths.wait() == FIRST_WAIT_S


def test_too_many_deaths_in_a_window_are_final_unless_forgiven() -> None:
    deaths = Deaths()
    for now in range(MAX_DEATHS):
        assert deaths.wait() is not None
        deaths.died(float(now))
    assert deaths.wait() is None
    deaths.forgive()
    assert deaths.wait() is not None
    deaths.died(WINDOW_S * 2)
    assert deaths.wait() is not None
