"""Whom objectives turn away: nobody who would keep them, nobody while there is no queue, no batch."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.scheduler.early_rejection import MARGIN, RELIEF
from memserve.scheduler.interface import Ask, Placement, SloAdmission
from memserve.scheduler.scheduler import Scheduler
from tests.scheduler.test_policies import MIXED, prompt, scheduler

SLO = 1.0
LENGTH = 500  # a prompt of which takes about an eighth of a second


def objective(num_instances: int = 1, admission: SloAdmission = "reject") -> Scheduler:
    """A scheduler whose models know a CPU, with that objective."""
    model = scheduler("cost", *[MIXED] * num_instances)
    made = Scheduler(dataclasses.replace(model._config, slo_ttft=SLO, slo_admission=admission))
    for number in range(num_instances):
        made.join(number, MIXED, num_blocks=[100_000], block_bytes=368_640, epoch=1)
    made.steps.costs = model.steps.costs
    return made


def ask(seed: int, *, length: int = LENGTH, tenant: str = "", priority: int = 0) -> Ask:
    return Ask(prompt=prompt(seed, length), max_tokens=8, tenant=tenant, priority=priority)


def queue(made: Scheduler, first: int, num: int, instance: int = 0, tenant: str = "") -> None:
    """So many prompts wait on an instance, whatever the policy thinks of it."""
    for ticket in range(first, first + num):
        asked = ask(ticket, tenant=tenant)
        placement = dataclasses.replace(
            made.place(asked, 0.0), prefill=instance, decode=instance, num_cached_tokens=0
        )
        made.dispatched(ticket, 0, asked, placement, 0.0)


def fill(made: Scheduler, first: int = 0, tenant: str = "") -> int:
    """Queue prompts until one is turned away; how many wait then."""
    for num in range(first, first + 1000):
        if made.too_late(ask(5000, tenant=tenant), 0.0) is not None:
            return num
        queue(made, num, 1, tenant=tenant)
    raise AssertionError("nobody was turned away")


def test_an_idle_server_takes_what_can_never_keep_the_objective() -> None:
    assert objective().too_late(ask(1, length=50_000), 0.0) is None


def test_nobody_is_turned_away_unless_the_operator_has_asked_for_it() -> None:
    made = objective(admission="none")
    queue(made, 0, 100)
    assert made.too_late(ask(999), 0.0) is None


def test_the_first_to_be_turned_away_would_miss_clearly_and_is_told_by_how_much() -> None:
    made = objective()
    num = fill(made)
    late = made.too_late(ask(5000), 0.0)
    assert late is not None
    assert late.objective == "slo_ttft"
    predicted = made.place(ask(5000), 0.0).prediction
    assert predicted is not None
    assert predicted.ttft == pytest.approx(SLO + late.seconds)
    assert predicted.ttft > MARGIN * SLO
    assert num > 4


def test_an_instance_without_a_queue_lets_everybody_in() -> None:
    made = objective(2)
    queue(made, 0, 100, instance=0)
    assert made.too_late(ask(999, length=20_000), 0.0) is None
    queue(made, 100, 100, instance=1)
    assert made.too_late(ask(999), 0.0) is not None


def test_one_tenants_flood_does_not_turn_away_another() -> None:
    made = objective()
    num = fill(made, tenant="flood")
    assert made.too_late(ask(5000, tenant="flood"), 0.0) is not None
    assert made.too_late(ask(5000, tenant="quiet"), 0.0) is None
    queue(made, num, 50, tenant="quiet")
    assert made.too_late(ask(5000, tenant="quiet"), 0.0) is not None


def test_who_goes_first_by_priority_is_let_in() -> None:
    made = objective()
    fill(made)
    assert made.too_late(ask(5000), 0.0) is not None
    assert made.too_late(ask(5000, priority=-20), 0.0) is None


def test_once_overloaded_every_miss_is_turned_away_until_the_queue_has_shrunk() -> None:
    made = objective()
    num = fill(made)

    def predicted() -> float:
        prediction = made.place(ask(5000), 0.0).prediction
        assert prediction is not None
        return prediction.ttft

    for ticket in range(num):
        late, ttft = made.too_late(ask(5000), 0.0), predicted()
        assert (late is not None) == (ttft > SLO)  # no margin any more
        if ttft < RELIEF * SLO:
            break
        made.ended(ticket, 0.0)
    assert ttft < RELIEF * SLO
    refill = num
    while predicted() < (1 + MARGIN) / 2 * SLO:
        queue(made, refill, 1)
        refill += 1
    assert made.too_late(ask(5000), 0.0) is None  # it misses, but not clearly


def test_a_prompt_that_is_longer_than_the_objective_by_itself_may_wait_in_proportion() -> None:
    made = objective()
    fill(made)
    assert made.too_late(ask(5000), 0.0) is not None
    assert made.too_late(ask(5000, length=20_000), 0.0) is None


def test_a_full_batch_counts_as_a_queue() -> None:
    made = objective()
    for _ in range(1000):
        made._lengths.add(3000)  # so answers are long, and room is scarce
    for ticket in range(64):  # as many as run at once
        long = Ask(prompt=prompt(ticket, 40), max_tokens=4000)
        placement = Placement(prefill=0, decode=0, num_cached_tokens=0)
        made.dispatched(ticket, 0, long, placement, 0.0)
        made.first_token(ticket, 0.1)
    queue(made, 64, 2)
    assert made.too_late(ask(5000), 0.2) is not None
    for ticket in range(8):
        made.ended(ticket, 0.3)
    assert made.too_late(ask(5000), 0.3) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.lists(st.integers(16, 6000), min_size=1, max_size=8),
)
def test_who_is_predicted_to_keep_the_objective_is_never_turned_away(
    queues: list[int], lengths: list[int]
) -> None:
    made = objective(len(queues))
    for instance, num in enumerate(queues):
        queue(made, 100 * instance, num, instance=instance)
    for number, length in enumerate(lengths):
        asked = ask(7000 + number, length=length)
        prediction = made.place(asked, 0.0).prediction
        assert prediction is not None
        if prediction.ttft <= SLO or 0 in queues:
            assert made.too_late(asked, 0.0) is None


TPOT = 0.06


def crowd(
    num_instances: int, *, slo_tpot: float = TPOT, slo_ttft: float | None = None
) -> Scheduler:
    """A scheduler that looks after the pace of answers."""
    made = objective(num_instances)
    config = dataclasses.replace(made._config, slo_ttft=slo_ttft, slo_tpot=slo_tpot)
    again = Scheduler(config)
    for number in range(num_instances):
        again.join(number, MIXED, num_blocks=[100_000], block_bytes=368_640, epoch=1)
    again.steps.costs = made.steps.costs
    return again


def stream(made: Scheduler, ticket: int, instance: int) -> None:
    """One more answer is generated there."""
    asked = Ask(prompt=prompt(ticket, 300), max_tokens=500)
    placement = Placement(prefill=instance, decode=instance, num_cached_tokens=0)
    made.dispatched(ticket, 0, asked, placement, 0.0)
    made.first_token(ticket, 0.1)


def fill_batches(made: Scheduler, num_instances: int) -> list[int]:
    """Add streams, to each instance in turn, until a newcomer is turned away; how many each has."""
    counts = [0] * num_instances
    for ticket in range(64 * num_instances):
        late = made.too_late(ask(5000), 100.0)
        if late is not None:
            assert late.objective == "slo_tpot"
            assert late.seconds > 0
            return counts
        stream(made, ticket, ticket % num_instances)
        counts[ticket % num_instances] += 1
    raise AssertionError("nobody was turned away")


def test_who_would_make_the_batch_too_large_for_its_pace_is_turned_away() -> None:
    made = crowd(1)
    (num,) = fill_batches(made, 1)
    costs, context = made.steps.costs, 300 + 64.0
    steps = [
        float(costs.decoding(np.array(float(n)), np.array(n * context))) for n in (num - 8, num + 8)
    ]
    assert steps[0] < TPOT < steps[1]
    made.ended(0, 100.0)
    assert made.too_late(ask(5000), 100.0) is None


def test_room_in_one_batch_lets_in() -> None:
    made = crowd(2)
    counts = fill_batches(made, 2)
    assert min(counts) > 8
    made.ended(1, 100.0)
    made.ended(3, 100.0)
    assert made.too_late(ask(5000), 100.0) is None


def test_an_idle_server_takes_what_can_never_keep_its_pace() -> None:
    made = crowd(1, slo_tpot=0.001)
    assert made.too_late(ask(1, length=50_000), 0.0) is None
    stream(made, 1, 0)
    late = made.too_late(ask(2), 1.0)
    # Nobody could: a second stream adds a tenth to the step, which is no crowd.
    assert late is None
    for ticket in range(2, 30):
        stream(made, ticket, 0)
    assert made.too_late(ask(2), 1.0) is not None


def test_with_both_objectives_each_turns_away_for_its_own_reason() -> None:
    made = crowd(1, slo_ttft=SLO)
    queue(made, 1000, 100)
    late = made.too_late(ask(5000), 0.0)
    assert late is not None
    assert late.objective == "slo_ttft"
    crowded = crowd(1, slo_ttft=SLO)
    fill_batches(crowded, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
    st.integers(16, 6000),
    st.floats(0.001, 0.5),
)
def test_an_instance_with_nothing_to_do_takes_everybody(
    batches: list[int], length: int, slo_tpot: float
) -> None:
    made = crowd(len(batches), slo_tpot=slo_tpot)
    for instance, num in enumerate(batches):
        for ticket in range(num):
            stream(made, 100 * instance + ticket, instance)
    if 0 in batches:
        assert made.too_late(ask(7000, length=length), 1.0) is None
