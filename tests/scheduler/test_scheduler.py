"""The scheduler as its callers see it."""

import pytest

from memserve.messages import IndexEvents
from memserve.pool.events import Inserted
from memserve.pool.index import pack_tokens
from memserve.scheduler.interface import (
    Ask,
    ContextCaching,
    Role,
    RoutingPolicy,
    SchedulerConfig,
)
from memserve.scheduler.scheduler import Scheduler

BLOCK = 4


def scheduler(
    *roles: Role,
    policy: RoutingPolicy = "cost",
    caching: ContextCaching = "3",
    elastic: bool = True,
) -> Scheduler:
    config = SchedulerConfig(
        block_size=BLOCK,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        routing_policy=policy,
        context_caching=caching,
        elastic_roles=elastic,
    )
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


def hold(made: Scheduler, instance: int, prompt: list[int], number: int = 1) -> None:
    """The instance tells that it keeps this prompt, from its block 0 on."""
    count = len(prompt) // BLOCK
    tokens = pack_tokens(prompt[: count * BLOCK])
    inserted = Inserted("", None, tokens, 0, [*range(count)], [0] * count)
    assert made.apply(instance, IndexEvents(number, [inserted]))


def test_a_prompt_goes_where_its_prefix_is_held() -> None:
    made = scheduler(Role.MIXED, Role.MIXED)
    hold(made, 1, [*range(400)])
    placement = made.place(Ask(prompt=[*range(400), 7, 8, 9], max_tokens=8), 3.0)
    assert (placement.prefill, placement.decode, placement.num_cached_tokens) == (1, 1, 400)


def test_equal_prompts_meet_before_the_first_is_computed() -> None:
    made = scheduler(Role.MIXED, Role.MIXED)
    places = []
    for ticket in range(2):
        ask = Ask(prompt=[*range(4000), ticket], max_tokens=1)
        placement = made.place(ask, 0.0)
        made.dispatched(ticket, 0, ask, placement, 0.0)
        places.append((placement.prefill, placement.num_cached_tokens))
    assert places == [(0, 0), (0, 4000)]


def test_roles_bind_prefill_and_decode() -> None:
    made = scheduler(Role.PREFILL, Role.DECODE, elastic=False)
    placement = made.place(Ask(prompt=[1] * 40, max_tokens=8), 0.0)
    assert (placement.prefill, placement.decode) == (0, 1)


def test_a_role_that_nobody_has_is_taken_over_by_the_others() -> None:
    made = scheduler(Role.PREFILL, Role.DECODE, elastic=False)
    ask = Ask(prompt=[1] * 40, max_tokens=8)
    made.leave(1)
    assert (made.place(ask, 0.0).prefill, made.place(ask, 0.0).decode) == (0, 0)
    made.join(1, Role.DECODE, num_blocks=[100], block_bytes=1, epoch=2)
    assert (made.place(ask, 0.0).prefill, made.place(ask, 0.0).decode) == (0, 1)
    made.set_leaving(0)
    assert (made.place(ask, 0.0).prefill, made.place(ask, 0.0).decode) == (1, 1)
    made.set_leaving(0, leaving=False)
    assert made.place(ask, 0.0).prefill == 0


def test_without_anyone_who_serves_there_is_no_place() -> None:
    made = scheduler(Role.PREFILL, elastic=False)
    made.set_leaving(0)
    with pytest.raises(LookupError):
        made.place(Ask(prompt=[1] * 40, max_tokens=8), 0.0)
    made.leave(0)
    with pytest.raises(LookupError):
        made.place(Ask(prompt=[1] * 40, max_tokens=8), 0.0)


def test_who_is_leaving_gets_no_new_work() -> None:
    made = scheduler(Role.MIXED, Role.MIXED)
    made.set_leaving(0)
    assert made.place(Ask(prompt=[1] * 40, max_tokens=8), 0.0).prefill == 1
