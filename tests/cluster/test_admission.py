import dataclasses
from array import array

import pytest

from memserve.cluster.admission import Admission
from memserve.cluster.capacity import Capacity
from memserve.errors import InvalidRequest, Overloaded
from memserve.generation import Generation
from memserve.messages import SamplingParams
from memserve.scheduler.interface import Late

MAX_SEQUENCE = 500
ROOM = Capacity(num_blocks=MAX_SEQUENCE, block_size=1, chunk_tokens=64, max_ranks=1)


def generation(num_tokens: int, num_choices: int = 1, request_id: str = "r") -> Generation:
    return Generation(
        request_id=request_id,
        prompt=array("i", [1] * num_tokens),
        sampling=SamplingParams(max_tokens=1, seed=0),
        num_choices=num_choices,
    )


def refused(admission: Admission, wanted: Generation) -> bool:
    try:
        admission.check(dataclasses.replace(wanted, request_id="wanted"), ROOM)
    except Overloaded as error:
        return (error.retry_after or 0) >= 1
    return False


def test_choices_are_counted_against_the_number() -> None:
    admission = Admission(4, 1000)
    admission.enter(generation(1, num_choices=3))
    assert not refused(admission, generation(1))
    assert refused(admission, generation(1, num_choices=2))


def test_prompt_tokens_are_counted_once_for_each_choice() -> None:
    admission = Admission(100, 30)
    admission.enter(generation(10, num_choices=2))
    assert not refused(admission, generation(10))
    assert refused(admission, generation(11))
    assert refused(admission, generation(6, num_choices=2))


@pytest.mark.parametrize("large", [generation(5, num_choices=9), generation(99)])
def test_what_is_larger_than_a_bound_gets_in_alone(large: Generation) -> None:
    admission = Admission(4, 20)
    small = generation(1)
    assert not refused(admission, large)
    admission.enter(small)
    assert refused(admission, large)
    admission.leave(small)
    assert not refused(admission, large)


def test_who_leaves_makes_room_for_as_much() -> None:
    admission = Admission(2, 20)
    for _ in range(100):
        admission.enter(generation(9, num_choices=2))
        assert refused(admission, generation(1))
        admission.leave(generation(9, num_choices=2))
        assert not refused(admission, generation(20))


def test_an_id_can_be_used_again_once_its_request_has_left() -> None:
    admission = Admission(4, 1000)
    admission.enter(generation(1))
    with pytest.raises(InvalidRequest, match="is in use"):
        admission.check(generation(1), ROOM)
    admission.leave(generation(1))
    admission.check(generation(1), ROOM)


def test_what_no_worker_can_hold_is_a_mistake_even_when_the_server_is_full() -> None:
    admission = Admission(1, 1000)
    admission.enter(generation(1))
    admission.leave(generation(1))
    admission.check(generation(MAX_SEQUENCE - 1), ROOM)
    admission.enter(generation(1))
    with pytest.raises(InvalidRequest, match="may take 501 tokens"):
        admission.check(generation(MAX_SEQUENCE, request_id="other"), ROOM)


def test_who_would_miss_the_objective_is_told_when_to_come_back() -> None:
    admission = Admission(4, 1000)
    admission.check_objective(None)
    for late, told in (
        (Late("slo_ttft", 0.01), 1.0),
        (Late("slo_tpot", 7.5), 7.5),
        (Late("slo_ttft", 1e6), 60.0),
    ):
        with pytest.raises(Overloaded) as refusal:
            admission.check_objective(late)
        assert (refusal.value.code, refusal.value.retry_after) == (late.objective, told)
