"""When a client that found no place should come back."""

from memserve.cluster.pace import MAX_S, MIN_S, Pace


def test_the_wait_follows_how_fast_requests_leave() -> None:
    pace = Pace()
    for number in range(200):
        pace.left(0.5 * number)
    assert round(pace.wait(100), 3) == 5.0
    for number in range(400):
        pace.left(100 + 0.1 * number)
    assert 1.0 <= pace.wait(100) < 1.1


def test_the_wait_stays_within_reason_whatever_is_known() -> None:
    pace = Pace()
    assert pace.wait(10) == MIN_S
    pace.left(0.0)
    assert pace.wait(10) == MIN_S
    pace.left(1e6)
    assert pace.wait(10) == MAX_S
