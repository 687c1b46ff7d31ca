"""What counts as the undisturbed answer, and which differences are ties."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from memserve.bench.client import Usage
from memserve.chaos.asking import COMPLETIONS, Answer, Asked, Choice
from memserve.chaos.judging import Difference, verdict
from memserve.chaos.plays import Scene
from memserve.chaos.ties import TIE, is_tie
from memserve.model.sampling import uniform

ASKED = Asked(kind="a kind", endpoint=COMPLETIONS, body={"max_tokens": 4, "temperature": 0})


def whole() -> Answer:
    return Answer(
        prompt=[1, 2],
        choices={
            index: Choice(
                text="abcd", tokens=[5, 6, 7, 8], logprobs=[-0.5] * 4, finish_reason="length"
            )
            for index in range(2)
        },
        usage=Usage(prompt_tokens=2, completion_tokens=8),
    )


SCENE = Scene(asked=ASKED, wanted=whole())


def test_the_same_answer_is_right_also_with_other_times_and_nearly_equal_logprobs() -> None:
    answer = whole()
    answer.choices[0].times = [1.0, 2.0]
    answer.choices[1].logprobs[2] += 5e-4
    assert verdict(SCENE, answer) is None


def test_the_beginning_is_right_only_for_a_client_that_has_left() -> None:
    answer = whole()
    answer.choices[1] = Choice(text="ab", tokens=[5, 6], logprobs=[-0.5] * 2)
    del answer.choices[0]
    assert isinstance(verdict(SCENE, answer), str)
    answer.left = True
    assert verdict(SCENE, answer) is None
    assert verdict(SCENE, Answer(left=True)) is None
    answer.choices[1].text = "ax"
    assert verdict(SCENE, answer) == "choice 1: its tokens are right and its text is not"


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer.prompt.append(3),
        lambda answer: answer.choices.pop(1),
        lambda answer: answer.choices[0].tokens.pop(),
        lambda answer: answer.choices[0].tokens.append(9),
        lambda answer: setattr(answer.choices[0], "text", "abce"),
        lambda answer: setattr(answer.choices[0], "finish_reason", "stop"),
        lambda answer: answer.choices[0].logprobs.pop(),
        lambda answer: answer.choices[0].logprobs.__setitem__(1, -0.6),
        lambda answer: setattr(answer.usage, "completion_tokens", 7),
    ],
)
def test_whatever_else_differs_is_wrong(change: Callable[[Answer], object]) -> None:
    answer = copy.deepcopy(whole())
    change(answer)
    assert isinstance(verdict(SCENE, answer), str)


@pytest.mark.parametrize("place", [0, 2])
def test_another_token_is_a_difference_at_the_first_place_of_it(place: int) -> None:
    answer = whole()
    answer.choices[1].tokens[place] = 40
    answer.choices[1].tokens[3] = 41
    difference = verdict(SCENE, answer)
    assert isinstance(difference, Difference)
    assert difference.choice == 1
    assert difference.common == [5, 6, 7, 8][:place]
    assert (difference.wanted, difference.got) == (5 + place, 40)


def difference(**body: object) -> Difference:
    asked = Asked(kind="a kind", endpoint=COMPLETIONS, body={"max_tokens": 4, **body})
    return Difference(asked=asked, prompt=[1, 2], choice=1, common=[5], wanted=3, got=4)


@pytest.mark.parametrize(("gap", "tie"), [(0.0, True), (TIE / 2, True), (0.01, False)])
def test_a_greedy_difference_is_a_tie_if_the_scores_are(gap: float, tie: bool) -> None:
    logits = torch.zeros(10)
    logits[3], logits[4] = 5.0 + gap, 5.0
    assert is_tie(logits, difference(temperature=0), ()) is tie


@pytest.mark.parametrize(("off", "tie"), [(0.0, True), (0.02, False)])
def test_a_seeded_difference_is_a_tie_if_the_draw_fell_on_the_border(off: float, tie: bool) -> None:
    border = uniform(seed=9, choice=1, position=1) + off
    logits = torch.full((10,), -30.0)
    logits[3], logits[4] = math.log(border), math.log(1 - border)
    assert is_tie(logits, difference(temperature=1.0, seed=9), ()) is tie


def test_penalties_come_before_a_tie_is_looked_for() -> None:
    logits = torch.zeros(10)
    logits[3], logits[5] = 5.0, 5.5  # token 5 stands in the answer already
    other = Difference(
        asked=Asked(
            kind="a kind",
            endpoint=COMPLETIONS,
            body={"max_tokens": 4, "temperature": 0, "presence_penalty": 0.5},
        ),
        prompt=[1, 2],
        choice=0,
        common=[5],
        wanted=3,
        got=5,
    )
    assert is_tie(logits, other, ())
