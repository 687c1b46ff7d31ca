"""Plays rehearsed and performed over real HTTP, before a cluster whose answers are written."""

import time
from pathlib import Path

import pytest

from memserve.chaos.asking import Answer, Asked, ask
from memserve.chaos.performing import Performance, User
from memserve.chaos.plays import KINDS, Play, Program, rehearse
from memserve.chaos.run import open_http, touched_gaps
from memserve.errors import UsageError
from memserve.generation import Generation
from memserve.tokens import Tokenizer
from tests.fakes import ScriptedGenerator, byte_tokenizer
from tests.serving import Served, serve

LETTERS = range(97, 123)
PROGRAM = Program(seed=7, num_plays=2 * len(KINDS), vocab=LETTERS, max_model_len=90)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


def letters(generation: Generation, choice: int) -> list[int]:
    """What follows from the prompt and the choice."""
    start = sum(generation.prompt) + 7 * choice
    return [97 + (start + 5 * place) % 26 for place in range(100)]


async def rehearsed(served: Served) -> list[Play]:
    async with open_http(served.url) as http:

        async def send(asked: Asked, request_id: str) -> Answer:
            return await ask(http, asked, request_id=request_id)

        return await rehearse(PROGRAM, send)


async def test_equal_programs_give_equal_plays_of_all_kinds(tokenizer: Tokenizer) -> None:
    async with serve(tokenizer, ScriptedGenerator(letters)) as served:
        plays, again = await rehearsed(served), await rehearsed(served)
    asked = [[scene.asked for scene in play] for play in plays]
    assert asked == [[scene.asked for scene in play] for play in again]
    assert [play[0].asked.kind for play in plays] == [*KINDS, *KINDS]
    chat = next(play for play in plays if play[0].asked.kind == "chat" and len(play) > 1)
    messages = chat[1].asked.body["messages"]
    assert isinstance(messages, list)
    assert messages[1]["content"] == chat[0].wanted.choices[0].text
    stop = next(play[0] for play in plays if play[0].asked.kind == "stop")
    assert stop.wanted.choices[0].finish_reason == "stop"
    document = next(play[0].wanted for play in plays if play[0].asked.kind == "document")
    assert len(document.choices[0].tokens) == 48
    assert len(document.choices[0].times) > 1


async def test_what_is_answered_alike_is_right_and_some_leave(tokenizer: Tokenizer) -> None:
    async with serve(tokenizer, ScriptedGenerator(letters)) as served:
        plays = await rehearsed(served)
        performance = Performance()
        async with open_http(served.url) as http:
            await User(0, 1, http, performance).run(plays, time.monotonic() + 1)
            for play in plays:
                await User(1, 2, http, performance).perform(play, leaves=0.5)
    assert performance.failed == performance.wrong == []
    assert performance.differences == []
    assert 0 < performance.num_left < performance.num_requests
    assert performance.gaps


async def test_another_answer_is_noted_and_a_failure_too(tokenizer: Tokenizer) -> None:
    generator = ScriptedGenerator(letters)
    async with serve(tokenizer, generator) as served:
        plays = await rehearsed(served)
        performance = Performance()
        async with open_http(served.url) as http:
            user = User(0, 1, http, performance)
            generator.answer = lambda generation, choice: [*letters(generation, choice)[:9], 64, 64]
            for play in plays:
                await user.perform(play, leaves=0.0)
            assert len(performance.differences) == len(plays)
            generator.fail_at = 3
            for play in plays:
                await user.perform(play, leaves=0.0)
    assert len(performance.failed) == len(plays)
    assert performance.wrong == []


async def test_a_server_that_fails_undisturbed_is_the_operators_mistake(
    tokenizer: Tokenizer,
) -> None:
    generator = ScriptedGenerator(letters)
    generator.fail_at = 2
    async with serve(tokenizer, generator) as served:
        with pytest.raises(UsageError, match="before anything was disturbed"):
            await rehearsed(served)


def test_the_log_tells_which_streams_a_death_has_touched() -> None:
    log = (
        "12:00 request chaos-1-2-0-0, choice 1: goes on at token 7 on instance 0\n"
        "12:01 request chaos-1-2-0-0, choice 0: has ended\n"
        "12:02 request chaos-9-9-9-0, choice 0: goes on at token 0 on instance 1\n"
    )
    performance = Performance()
    performance.gaps = {("chaos-1-2-0", 0): 0.1, ("chaos-1-2-0", 1): 2.5}
    assert touched_gaps(log, performance) == [2.5]
