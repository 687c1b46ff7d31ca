"""The scheduler as its callers see it."""

import pytest

from memserve.scheduler.interface import Ask, Role, SchedulerConfig
from memserve.scheduler.scheduler import Scheduler

BLOCK = 4


def scheduler(*roles: Role) -> Scheduler:
    config = SchedulerConfig(block_size=BLOCK, max_num_batched_tokens=64, max_num_seqs=8)
    made = Scheduler(config)
    for number, role in enumerate(roles):
        made.join(number, role, num_blocks=[100], block_bytes=1000, epoch=1)
    return made


def test_a_burst_spreads_before_any_answer_comes() -> None:
    made = scheduler(Role.MIXED, Role.MIXED, Role.MIXED)
    places = []
    for ticket in range(3):
        ask = Ask(prompt=[ticket] * 40, max_tokens=8)
        placement = made.place(ask, 0.0)
        made.dispatched(ticket, 0, ask, placement, 0.0)
        places.append(placement.prefill)
    assert sorted(places) == [0, 1, 2]


def test_a_prompt_goes_where_its_prefix_was_just_sent() -> None:
    made = scheduler(Role.MIXED, Role.MIXED)
    ask = Ask(prompt=list(range(400)), max_tokens=8)
    first = made.place(ask, 0.0)
    made.dispatched(1, 0, ask, first, 0.0)
    made.first_token(1, 1.0)
    made.ended(1, 2.0)
    again = made.place(Ask(prompt=[*range(400), 7, 8, 9], max_tokens=8), 3.0)
    assert (again.prefill, again.num_cached_tokens) == (first.prefill, 400)


def test_roles_bind_prefill_and_decode() -> None:
    made = scheduler(Role.PREFILL, Role.DECODE)
    placement = made.place(Ask(prompt=[1] * 40, max_tokens=8), 0.0)
    assert (placement.prefill, placement.decode) == (0, 1)


def test_without_anyone_to_decode_there_is_no_place() -> None:
    with pytest.raises(LookupError):
        scheduler(Role.PREFILL).place(Ask(prompt=[1] * 40, max_tokens=8), 0.0)


def test_who_is_leaving_gets_no_new_work() -> None:
    made = scheduler(Role.MIXED, Role.MIXED)
    made.set_leaving(0)
    assert made.place(Ask(prompt=[1] * 40, max_tokens=8), 0.0).prefill == 1
