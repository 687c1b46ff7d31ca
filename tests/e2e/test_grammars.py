"""Answers that are held to a form, from real servers by way of the openai client."""

import json
import re
from typing import Any

import openai
import pytest

from tests.e2e.servers import ServerProcess, assert_all_home

MODEL = "SmolLM2-135M-Instruct"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["old", "wise", "naïve"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK: list[Any] = [{"role": "user", "content": "Describe a person called Ann as JSON."}]


def assert_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 12
    assert 0 <= person["age"] <= 130
    assert set(person["tags"]) <= {"old", "wise", "naïve"}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_choice_is_json_by_its_schema(
    disaggregated: ServerProcess, temperature: float
) -> None:
    """The first token is drawn on one worker, the others on another."""
    answer = disaggregated.client().chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=temperature,
        seed=3,
        n=4,
        max_tokens=200,
        logprobs=True,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON, "strict": True},
        },
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert_person(choice.message.content or "")
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(token.logprob < 0.01 for token in choice.logprobs.content)
    assert len({choice.message.content for choice in answer.choices}) == (
        1 if not temperature else 4
    )
    assert_all_home(disaggregated)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "(red|green) [0-9]{3}"}, "(red|green) [0-9]{3}"),
        ({"choice": ["Paris", "Rome", "São Paulo"]}, "Paris|Rome|São Paulo"),
        ({"grammar": 'root ::= "say " ("a" | "b")+ "!"'}, "say [ab]+!"),
        ({"json": json.dumps({"const": [1, 2]}), "disable_any_whitespace": True}, r"\[1,2\]"),
        ({"json_object": True}, r"\{.*"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_streams_keep_to_vllms_kinds_of_forms(
    disaggregated: ServerProcess, wanted: dict[str, Any], pattern: str
) -> None:
    stream = disaggregated.client().completions.create(
        model=MODEL,
        prompt="Say something:",
        max_tokens=24,
        temperature=1.0,
        seed=1,
        stream=True,
        extra_body={"structured_outputs": wanted, "logit_bias": {"17": 1}},
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert re.fullmatch(pattern, text, re.DOTALL), text


def test_a_grammar_that_only_the_worker_can_refuse(disaggregated: ServerProcess) -> None:
    client = disaggregated.client()
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="unknown special token"):
            client.completions.create(
                model=MODEL,
                prompt="a",
                stream=stream,
                extra_body={"structured_outputs": {"grammar": "start: <nobody>"}},
            )
    assert_all_home(disaggregated)
