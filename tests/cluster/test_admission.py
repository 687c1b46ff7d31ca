import pytest

from memserve.cluster.admission import Admission
from memserve.errors import Overloaded
from memserve.generation import Generation
from memserve.messages import SamplingParams


def generation(num_tokens: int, num_choices: int = 1) -> Generation:
    return Generation(
        request_id="r",
        prompt=[1] * num_tokens,
        sampling=SamplingParams(max_tokens=1, seed=0),
        num_choices=num_choices,
    )


def refused(admission: Admission, wanted: Generation) -> bool:
    try:
        admission.check(wanted)
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
