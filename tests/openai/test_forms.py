"""Forms that clients ask for become grammars, and those that can't be are refused with the reason."""

import json
from typing import Any

import pytest

from memserve.errors import InvalidRequest
from memserve.frontend.checking import GrammarChecker
from memserve.grammar import MAX_CHARS, json_grammar, regex_grammar
from memserve.openai.forms import AnswerForm, asked_form
from memserve.openai.requests import CompletionRequest, read_body


def form(**fields: Any) -> AnswerForm | None:
    body = json.dumps({"prompt": "p", **fields}).encode()
    return asked_form(read_body(body, CompletionRequest))


def test_text_asks_for_no_form() -> None:
    assert form() is None
    assert form(response_format=None, structured_outputs=None) is None
    assert form(response_format={"type": "text"}) is None


def test_both_ways_to_ask_for_json_mean_the_same() -> None:
    schema = {"type": "array", "items": {"const": "ü"}}
    by_format = form(
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    )
    assert by_format == AnswerForm(json_grammar(schema), "response_format.json_schema")
    for given in (schema, json.dumps(schema)):
        by_outputs = form(structured_outputs={"json": given})
        assert by_outputs == AnswerForm(by_format.grammar, "structured_outputs.json")
    any_object = form(response_format={"type": "json_object"})
    by_outputs = form(structured_outputs={"json_object": True})
    assert any_object is not None
    assert by_outputs is not None
    assert any_object.grammar == by_outputs.grammar


def test_space_in_json_is_as_the_client_wants_it() -> None:
    def grammar(**fields: Any) -> str:
        found = form(structured_outputs={"json": {"const": [1, 2]}, **fields})
        assert found is not None
        return found.grammar

    assert (
        len({grammar(), grammar(disable_any_whitespace=True), grammar(whitespace_pattern="x")}) == 3
    )


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({"json": "{" * 5000}, "neither a JSON schema nor the text"),
        ({"grammar": "root ::= " + "(" * 3000}, "recursion"),
        ({"grammar": "a" * (MAX_CHARS + 1)}, "too large"),
        ({"choice": ["a"] * 5000}, "got 5000"),
        ({"json_object": False}, "got 0"),
    ],
)
def test_what_can_not_be_made_a_grammar_is_refused(outputs: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        form(structured_outputs=outputs)
    assert refused.value.param is not None
    assert refused.value.param.startswith("structured_outputs")


async def test_a_bad_grammar_is_refused_each_time_and_a_good_one_known_again() -> None:
    checker = GrammarChecker()
    try:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="unclosed group") as refused:
                await checker.check(AnswerForm(regex_grammar("("), "structured_outputs.regex"))
            assert refused.value.param == "structured_outputs.regex"
            with pytest.raises(InvalidRequest, match="too large"):
                await checker.check(AnswerForm(regex_grammar("a" * MAX_CHARS), "f"))
            await checker.check(AnswerForm(regex_grammar("a"), "f"))
    finally:
        checker.close()
    await checker.check(AnswerForm(regex_grammar("a"), "f"))


async def test_hostile_grammars_end_in_an_error_and_not_in_a_crash() -> None:
    """Each of them overflows a stack of the usual size, or grows without end."""
    count = 7000
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(count)) + f'r{count}: "a"'
    terms = "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(60)) + 'R60: "a"'
    product = {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]}
            for i in range(14)
        ]
    }
    checker = GrammarChecker()
    try:
        good = form(structured_outputs={"grammar": chain})
        assert good is not None
        await checker.check(good)
        for outputs in ({"grammar": terms}, {"json": product}):
            bad = form(structured_outputs=outputs)
            assert bad is not None
            with pytest.raises(InvalidRequest, match=r"too (big|large)"):
                await checker.check(bad)
    finally:
        checker.close()
