"""The split of instances into prefill and decode that would serve the traffic best."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.scheduler.cost import StepCosts
from memserve.scheduler.fairness import Turn
from memserve.scheduler.interface import Placement, Role
from memserve.scheduler.layout_model import (
    OVERLOADED,
    Split,
    Traffic,
    _choose,
    expected_jct,
    expected_pressure,
    stall,
    traffic,
)
from memserve.scheduler.loads import Loads, Ticket

COSTS = StepCosts(
    step=0.015,
    low_row=0,
    middle_row=5e-5,
    high_row=7e-5,
    prefill_pair=0,
    decode=0,
    decode_pair=3e-8,
)
"""About 70 billion parameters on four GPUs; a step with 2,048 prompt tokens takes .15 s."""

LONG_PROMPTS = Traffic(rate=1.8, work=0.27, residual=0.02, answer=256, context=2200, cached=0)
SHORT_PROMPTS = Traffic(rate=1.8, work=0.02, residual=1e-4, answer=256, context=300, cached=0)


def jcts(seen: Traffic, num: int, capacity: float = 370_000) -> list[float]:
    found = expected_jct(
        seen, COSTS, num, slowdown=1.0, chunk=2048, capacity=capacity, handover=1e-3
    )
    assert len(found) == num
    return list(found)


def test_prompts_that_hold_up_long_answers_want_an_instance_of_their_own() -> None:
    mixed, split = jcts(LONG_PROMPTS, 2)
    assert split < 0.93 * mixed


def test_prompts_that_hold_up_nobody_want_all_instances_mixed() -> None:
    mixed, *splits = jcts(SHORT_PROMPTS, 4)
    assert mixed <= 1.01 * min(splits)


def test_prompts_pile_up_where_too_few_instances_take_them() -> None:
    heavy = Traffic(rate=6, work=3.2, residual=1, answer=256, context=8300, cached=0)
    found = jcts(heavy, 5)
    assert [jct >= OVERLOADED for jct in found] == [False, True, True, True, False]
    assert found[4] < 0.8 * found[0]


def test_what_no_split_can_serve_is_left_to_the_one_that_lacks_least() -> None:
    flood = Traffic(rate=40, work=9.0, residual=1, answer=4, context=8000, cached=0)
    found = jcts(flood, 4)
    assert min(found) >= OVERLOADED
    assert _choose(np.array(found), 1) == 0


def test_contexts_must_fit_where_they_decode() -> None:
    fitting = jcts(LONG_PROMPTS, 4, capacity=12_000)
    assert fitting[1] < OVERLOADED <= fitting[3]


@given(st.lists(st.floats(0.1, 10) | st.just(math.inf), min_size=2, max_size=6), st.integers(0, 5))
def test_what_has_been_chosen_stays_chosen_while_nothing_changes(
    expected: list[float], before: int
) -> None:
    jct = np.array(expected)
    chosen = _choose(jct, before % len(jct))
    assert _choose(jct, chosen) == chosen


def loads_under(rate: float, seconds: float, *, prefill_seconds: float, answer: int) -> Loads:
    """Two mixed instances that were given prompts of 2,000 tokens in turns, none of it done."""
    loads = Loads()
    for instance in range(2):
        loads.join(instance, Role.MIXED, capacity=370_000, block_bytes=1)
    for number in range(round(rate * seconds)):
        ticket = Ticket(
            placement=Placement(prefill=number % 2, decode=number % 2, num_cached_tokens=0),
            prefill=[number % 2],
            decode=number % 2,
            packed=b"",
            salt="",
            turn=Turn("", 0.0, 1.0),
            num_prompt_tokens=2000,
            max_tokens=answer,
            num_new_tokens=2000,
            num_new_pairs=0,
            num_new_read=0,
            expected_end=answer,
            dispatched_at=number / rate,
        )
        loads.dispatched(ticket, prefill_seconds, number / rate)
    return loads


@pytest.mark.parametrize("seconds", [3.0, 10.0, 60.0])
def test_the_rate_is_known_from_the_beginning_on(seconds: float) -> None:
    loads = loads_under(6.0, seconds, prefill_seconds=0.1, answer=100)
    seen = traffic(loads, seconds, 1.0)
    assert seen is not None
    assert seen.rate == pytest.approx(6.0, rel=0.4)
    assert seen.work == pytest.approx(0.6, rel=0.4)
    assert (seen.answer, seen.cached) == pytest.approx((100, 0))


def follow(split: Split, loads: Loads, now: float) -> list[bool]:
    """Look at the traffic; who is to prefill."""
    split.follow(loads, COSTS, now, slowdown=1.0, chunk=2048, handover=1e-3)
    special: list[bool] = loads.rows["special"].tolist()
    return special


def test_one_of_two_instances_is_to_prefill_while_long_prompts_come() -> None:
    split = Split()
    loads = loads_under(1.8, 10.0, prefill_seconds=0.15, answer=256)
    special = follow(split, loads, 10.0)
    assert sum(special) == 1
    loads.rows["pressure"] = (0.1, 0.3)
    expected = expected_pressure(loads, np.ones(2))
    assert expected.tolist() == pytest.approx([0.4 * one for one in special])
    assert stall(loads, expected).tolist() == pytest.approx([one * 0.4 / 0.6 for one in special])
    # Who prefills stays the same instance, and an end of the traffic ends its role.
    assert follow(split, loads, 11.5) == special
    assert split.known
    assert follow(split, loads, 100.0) == [False, False]
    assert not split.known
    assert expected_pressure(loads, np.ones(2)).tolist() == pytest.approx([0.1, 0.3])


def test_an_instance_that_leaves_prefills_no_more() -> None:
    split = Split()
    loads = loads_under(1.8, 10.0, prefill_seconds=0.15, answer=256)
    special = follow(split, loads, 10.0)
    loads.set_leaving(special.index(True))
    assert not loads.rows["special"].any()
    # One is left: nothing to split.
    assert follow(split, loads, 11.5) == [False, False]


def test_when_all_that_decoded_have_gone_not_all_that_are_left_prefill() -> None:
    split = Split()
    loads = loads_under(1.8, 10.0, prefill_seconds=0.15, answer=256)
    loads.join(2, Role.MIXED, capacity=370_000, block_bytes=1)
    loads.rows["special"] = (True, True, False)
    loads.leave(2, [])
    assert sum(follow(split, loads, 10.0)) == 1


def test_slower_steps_are_in_the_expectation() -> None:
    slow = replace(LONG_PROMPTS, work=2 * LONG_PROMPTS.work)
    twice = expected_jct(slow, COSTS, 2, slowdown=2.0, chunk=2048, capacity=370_000, handover=1e-3)
    assert (twice > np.array(jcts(LONG_PROMPTS, 2)) * 1.9).all()
