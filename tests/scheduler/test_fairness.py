"""In what order a queue is served, seen on a simulated one."""

import heapq

from memserve.scheduler.fairness import MAX_FLOWS, FairOrder, Turn

Served = list[tuple[str, int]]


def serve(arrivals: list[tuple[int, str, int]], num_turns: int) -> Served:
    """One request a turn, each one second of work; arrivals are (turn, tenant, priority)."""
    fair = FairOrder()
    waiting: list[tuple[float, int, Turn]] = []
    served: Served = []
    pending = sorted(arrivals, key=lambda arrival: arrival[0])
    for turn in range(num_turns):
        while pending and pending[0][0] <= turn:
            _, tenant, priority = pending.pop(0)
            order = fair.order(tenant, priority)
            heapq.heappush(waiting, (order, len(pending), fair.charge(tenant, 1.0)))
        if waiting:
            _, _, place = heapq.heappop(waiting)
            fair.served(place)
            served.append((place.flow, turn))
    return served


def test_a_flood_of_one_tenant_does_not_starve_another() -> None:
    flood = [(0, "flood", 0)] * 200
    trickle = [(turn, "quiet", 0) for turn in range(10, 100, 10)]
    served = serve(flood + trickle, 200)
    turns = [turn for tenant, turn in served if tenant == "quiet"]
    assert len(turns) == len(trickle)
    assert all(turn - sent <= 2 for turn, (sent, _, _) in zip(turns, trickle, strict=True))


def test_two_floods_share_alike() -> None:
    served = serve([(0, "a", 0)] * 100 + [(0, "b", 0)] * 100, 100)
    assert abs(sum(tenant == "a" for tenant, _ in served) - 50) <= 1


def test_the_urgent_go_first() -> None:
    served = serve([(0, "slow", 5), (0, "normal", 0), (0, "urgent", -5)], 3)
    assert [tenant for tenant, _ in served] == ["urgent", "normal", "slow"]


def test_low_priority_is_served_though_urgent_requests_never_end() -> None:
    urgent = [(turn, "urgent", -20) for turn in range(500)]
    served = serve([(0, "low", 20), *urgent], 500)
    assert any(tenant == "low" for tenant, _ in served)


def test_what_idle_tenants_did_long_ago_gives_no_credit() -> None:
    busy = [(turn, "busy", 0) for turn in range(50)]
    served = serve([*busy, *[(50, "late", 0)] * 10, *[(50, "busy", 0)] * 10], 70)
    last = [tenant for tenant, turn in served if turn >= 50]
    assert abs(last[:10].count("late") - 5) <= 1


def test_f6_tags_of_endlessly_many_tenants_are_bounded_and_heavy_users_are_remembered() -> None:
    """Each of them comes once, with little work."""
    fair = FairOrder()
    fair.charge("heavy", 1e6)
    for number in range(5 * MAX_FLOWS):
        fair.served(fair.charge(f"tenant {number}", 1.0))
    assert len(fair._ends) <= MAX_FLOWS
    assert len(fair._num_waiting) == 1
    assert fair.start("heavy") == 1e6


def test_a_second_turn_comes_though_new_tenants_never_end() -> None:
    newcomers = [(turn, f"{turn} {number}", 0) for turn in range(300) for number in range(2)]
    served = serve([(0, "chat", 0), (1, "chat", 0), *newcomers], 300)
    turns = [turn for tenant, turn in served if tenant == "chat"]
    assert len(turns) == 2
    assert turns[1] < 30
