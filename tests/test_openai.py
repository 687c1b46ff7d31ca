import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.errors import InvalidRequest, NotFound, RequestFailed
from memserve.frontend.streaming import Answers, open_answers
from memserve.frontend.timeline import Timeline
from memserve.generation import ChoiceToken, Generation
from memserve.messages import TokenEvent
from memserve.openai.answer import Choice, Delta
from memserve.openai.memo import ChatMemo
from memserve.openai.plan import Caller, Plan, ServedModel, TextRules, plan_chat, plan_completion
from memserve.openai.presenting import LEAST_LOGPROB, presenter_for
from memserve.openai.requests import ChatRequest, CompletionRequest, read_body
from memserve.tokens import Tokenizer
from tests.fakes import EOS, VOCAB_SIZE, ScriptedGenerator, byte_tokenizer

CALLER = Caller(request_id="id")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model(tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        name="m",
        tokenizer=tokenizer,
        max_model_len=128,
        vocab_size=VOCAB_SIZE,
        base_seed=1000,
        numbers=itertools.count(),
        memo=ChatMemo(1 << 20),
    )


def completion(served: ServedModel, /, **fields: Any) -> Plan:
    return plan_completion(json.dumps({"prompt": "abc", **fields}).encode(), served, CALLER)


def chat(served: ServedModel, /, **fields: Any) -> Plan:
    messages = [{"role": "user", "content": "abc"}]
    return plan_chat(json.dumps({"messages": messages, **fields}).encode(), served, CALLER)


def life() -> Timeline:
    return Timeline("id", on_gap=lambda gap: None)


def test_a_completion_gets_sixteen_tokens_or_what_room_there_is(model: ServedModel) -> None:
    assert completion(model).generations[0].sampling.max_tokens == 16
    assert completion(model, prompt="a" * 120).generations[0].sampling.max_tokens == 8
    assert completion(model, prompt="a" * 120, max_tokens=8).num_prompt_tokens == 120


def test_a_chat_gets_all_the_room_that_its_prompt_leaves(model: ServedModel) -> None:
    generation = chat(model).generations[0]
    assert generation.sampling.max_tokens == 128 - len(generation.prompt)
    both = chat(model, max_tokens=5, max_completion_tokens=7)
    assert both.generations[0].sampling.max_tokens == 7


def test_a_prompt_too_long_names_the_limit_and_its_own_length(model: ServedModel) -> None:
    with pytest.raises(InvalidRequest, match=r"context length is 128 tokens.*has 3 and 126 more"):
        completion(model, max_tokens=126)
    assert completion(model, prompt="a" * 500, truncate_prompt_tokens=100).num_prompt_tokens == 100
    with pytest.raises(InvalidRequest, match="maximum context length"):
        completion(model, prompt="a" * 500, truncate_prompt_tokens=-1)


def test_seeds_are_drawn_from_the_servers_unless_the_client_brings_one(model: ServedModel) -> None:
    drawn = [completion(model).generations[0].sampling.seed for _ in range(3)]
    assert drawn == [1000, 1001, 1002]
    assert completion(model, seed=7).generations[0].sampling.seed == 7
    assert completion(model, seed=-1).generations[0].sampling.seed == (1 << 63) - 1


def test_logprobs_are_asked_for_in_each_apis_own_way(model: ServedModel) -> None:
    assert completion(model).logprobs is None
    assert completion(model, logprobs=0).logprobs == 0
    assert chat(model, logprobs=True).logprobs == 0
    assert chat(model, logprobs=True, top_logprobs=20).logprobs == 20
    assert chat(model, logprobs=False, top_logprobs=0).logprobs is None


def test_a_tenant_is_its_key_or_else_its_salt_and_user(model: ServedModel) -> None:
    def tenant(**fields: Any) -> str:
        return completion(model, **fields).generations[0].tenant

    assert tenant() == tenant(user="", cache_salt=None) == ""
    assert len({tenant(user="ab"), tenant(cache_salt="ab"), tenant(cache_salt="a", user="b")}) == 3
    body = json.dumps({"prompt": "abc", "user": "u"}).encode()
    keyed = plan_completion(body, model, Caller(request_id="id", tenant="key 1"))
    assert keyed.generations[0].tenant == "key 1"


def test_another_models_name_is_not_found(model: ServedModel) -> None:
    assert completion(model, model="m").model == "m"
    with pytest.raises(NotFound):
        chat(model, model="gpt-4")


def test_bodies_survive_any_json_with_an_error_that_names_no_internals(model: ServedModel) -> None:
    fields = (*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__)
    text = st.text(alphabet='ab1{"é', max_size=5)
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=5,
    )

    @settings(deadline=None)
    @given(st.dictionaries(st.sampled_from(fields), values, max_size=4))
    def check(extra: dict[str, Any]) -> None:
        for make in (completion, chat):
            try:
                plan = make(model, **extra)
            except (InvalidRequest, NotFound) as error:
                assert error.message  # noqa: PT017
                assert "Traceback" not in error.message  # noqa: PT017
            else:
                assert 1 <= plan.num_choices <= 128
                assert all(0 < one.sampling.max_tokens < 128 for one in plan.generations)

    check()


def test_a_nested_field_is_named_by_its_path() -> None:
    body = b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 5}]}'
    with pytest.raises(InvalidRequest) as caught:
        read_body(body, ChatRequest)
    assert caught.value.param == "messages[1].content"


def absorb_all(choice: Choice, tokens: list[int], finish: str = "length") -> Delta:
    delta = Delta(choice.index)
    for position, token in enumerate(tokens):
        last = position + 1 == len(tokens)
        event = TokenEvent(1, position, token, finish if last else None)
        choice.absorb(event, delta)
        if choice.finished:
            break
    return delta


@settings(deadline=None)
@given(
    text=st.text(alphabet="abcé🌍", max_size=30),
    stops=st.lists(st.text(alphabet="abcé🌍", min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
)
def test_an_answer_is_the_text_up_to_its_first_stop(
    tokenizer: Tokenizer, text: str, stops: list[str], include: bool
) -> None:
    rules = TextRules(stops=tuple(stops), include_stop=include)
    delta = absorb_all(Choice(0, rules, tokenizer), [*tokenizer.encode(text), EOS], "stop")
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text if not ends else text[: min(ends)[0 if include else 1]]
    assert delta.text == expected
    assert delta.finish_reason == "stop"
    assert (delta.stop_reason in stops) == bool(ends)


def test_a_stop_string_among_the_least_tokens_is_text(tokenizer: Tokenizer) -> None:
    choice = Choice(0, TextRules(stops=("c",), min_tokens=3), tokenizer)
    assert absorb_all(choice, tokenizer.encode("abcabc")).text == "abcab"


def test_a_stop_string_completed_by_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    choice = Choice(0, TextRules(stops=("bc",)), tokenizer)
    delta = absorb_all(choice, tokenizer.encode("abc"), "length")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", "stop", "bc")


def test_an_unfinished_character_at_the_end_shows_as_a_replacement(tokenizer: Tokenizer) -> None:
    delta = absorb_all(Choice(0, TextRules(), tokenizer), tokenizer.encode("a🌍")[:3])
    assert delta.text == "a\ufffd"
    assert delta.num_tokens == 3


def test_a_stop_token_is_a_reason_and_the_end_of_sequence_is_none(tokenizer: Tokenizer) -> None:
    rules = TextRules(stop_token_ids=frozenset({5}))
    stopped = absorb_all(Choice(0, rules, tokenizer), [1, 5], "stop")
    ended = absorb_all(Choice(0, rules, tokenizer), [1, EOS], "stop")
    at_length = absorb_all(Choice(0, rules, tokenizer), [1, 5], "length")
    assert [stopped.stop_reason, ended.stop_reason, at_length.stop_reason] == [5, None, None]
    assert len(at_length.text) == len(stopped.text) + 1


async def test_tokens_that_nobody_took_are_merged(model: ServedModel, tokenizer: Tokenizer) -> None:
    plan = completion(model, n=2)
    answers = Answers(plan, tokenizer, life())
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("abcdef"))
    generation = plan.generations[0]
    async with generator.generate(generation) as tokens:
        await answers.pump(generator, generation, 0, tokens)
    deltas = await answers.take()
    assert [(delta.index, delta.text) for delta in deltas] == [(0, "abcdef"), (1, "abcdef")]
    assert [len(delta.events) for delta in deltas] == [7, 7]
    assert await answers.take() == []


async def test_a_stream_that_breaks_off_is_a_failure(
    model: ServedModel, tokenizer: Tokenizer
) -> None:
    plan = completion(model)
    answers = Answers(plan, tokenizer, life())

    async def one_token() -> AsyncIterator[ChoiceToken]:
        yield ChoiceToken(0, TokenEvent(1, 0, 5))

    generator = ScriptedGenerator(lambda generation, choice: [])
    with pytest.raises(RequestFailed):
        await answers.pump(generator, plan.generations[0], 0, one_token())


async def test_a_refused_prompt_of_a_batch_ends_those_admitted_before_it(
    model: ServedModel, tokenizer: Tokenizer
) -> None:
    plan = completion(model, prompt=["a", "b", "c"])

    def answer(generation: Generation, choice: int) -> list[int]:
        return tokenizer.encode("x")

    generator = ScriptedGenerator(answer)
    generator.refuse_after(2, InvalidRequest("never fits"))
    with pytest.raises(InvalidRequest, match="never fits"):
        async with open_answers(generator, plan, tokenizer, life()):
            pytest.fail("one generation was refused")
    assert len(generator.generations) == 3
    assert generator.num_inside == 0


async def test_a_failure_reaches_the_one_who_waits_as_itself(
    model: ServedModel, tokenizer: Tokenizer
) -> None:
    plan = completion(model, prompt=["a", "b"])
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("xyz"))
    generator.fail_at = 2
    with pytest.raises(RequestFailed, match="has died"):
        async with open_answers(generator, plan, tokenizer, life()) as answers:
            await answers.take_whole()
    assert generator.num_inside == 0


async def test_whoever_is_cancelled_leaves_his_generations(
    model: ServedModel, tokenizer: Tokenizer
) -> None:
    plan = completion(model, n=3)
    generator = ScriptedGenerator(lambda generation, choice: tokenizer.encode("xyz"))
    generator.hold_at = 1

    async def wait() -> None:
        async with open_answers(generator, plan, tokenizer, life()) as answers:
            await answers.take_whole()

    task = asyncio.create_task(wait())
    await generator.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert generator.num_inside == 0


def test_impossible_tokens_have_a_log_probability_that_json_can_write(
    model: ServedModel, tokenizer: Tokenizer
) -> None:
    plan = chat(model, logprobs=True, top_logprobs=1)
    presenter = presenter_for(plan, tokenizer, created=1, system_fingerprint="f")
    event = TokenEvent(1, 0, 5, None, float("-inf"), ((6, float("-inf")),))
    chunks = presenter.chunks(Delta(0, [""], [event], 1), None)
    written = json.loads(msgspec.json.encode(chunks[-1]))
    entry = written["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == LEAST_LOGPROB
    assert "usage" not in written


def test_chunks_have_a_null_usage_when_the_last_one_will_carry_it(
    model: ServedModel, tokenizer: Tokenizer
) -> None:
    for make in (chat, completion):
        plan = make(model, stream=True, stream_options={"include_usage": True})
        presenter = presenter_for(plan, tokenizer, created=1, system_fingerprint="f")
        chunk = presenter.chunks(Delta(0, ["a"], [], 1), None)[0]
        assert json.loads(msgspec.json.encode(chunk))["usage"] is None


def test_every_scripted_folder_is_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    made = byte_tokenizer(tmp_path)
    assert len(made.encode("é🌍")) == 6
    assert made.decode(made.encode("é🌍")) == "é🌍"
