"""Answers drawn along grammars match them, wherever they are taken up again."""

import json
import queue
import re
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.grammar import (
    GrammarError,
    choice_grammar,
    context_free_grammar,
    json_grammar,
    regex_grammar,
)
from memserve.messages import Abort, Expect, SamplingParams, Settle, Submit, ToWorker
from memserve.tokens import Tokenizer
from memserve.workers import grammars as module
from memserve.workers.grammars import Grammars, Porter
from tests.fakes import EOS, IM_START, VOCAB_SIZE, byte_tokenizer, word_tokenizer
from tests.grammars import drawn

MERGES = [("{", '"'), ('"', ":"), ('"', ","), ("a", "b"), ("t", "r"), ("tr", "u"), ("1", "2")]
SIZE = VOCAB_SIZE + len(MERGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return byte_tokenizer(folder, MERGES)


@pytest.fixture(scope="module")
def grammars(folder: Path, tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(folder / "tokenizer.json", SIZE, [EOS])
    yield made
    made.close()


def strings(**bounds: int) -> dict[str, Any]:
    return {"type": "string", **bounds}


LEAVES = st.sampled_from(
    [
        {"type": "null"},
        {"type": "boolean"},
        {"type": "integer", "minimum": -3, "maximum": 130},
        {"type": "number", "minimum": 0, "maximum": 1},
        strings(maxLength=5),
        {"type": "string", "pattern": "^[a-c]{2}é?$"},
        {"enum": ["a\n", 1.5, None, {"b": [True]}]},
        {"const": "ü"},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(lambda one: {"type": "array", "items": one, "maxItems": 3}, inner)
        | st.builds(
            lambda props, n: {
                "type": "object",
                "properties": props,
                "required": sorted(props)[:n],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b b", 'q"', "é"]), inner, max_size=3),
            st.integers(0, 2),
        )
        | st.builds(lambda left, right: {"anyOf": [left, right]}, inner, inner)
    ),
    max_leaves=6,
)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """The keywords of `SCHEMAS`, once more."""
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    if "const" in schema:
        return bool(value == schema["const"])
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer" | "number":
            kinds = (int, float) if schema["type"] == "number" else int
            is_kind = isinstance(value, kinds) and not isinstance(value, bool)
            return is_kind and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return (
                isinstance(value, str)
                and len(value) <= schema.get("maxLength", 99)
                and bool(re.search(schema.get("pattern", ""), value))
            )
        case "array":
            return (
                isinstance(value, list)
                and len(value) <= 3
                and all(valid(one, schema["items"]) for one in value)
            )
        case "object":
            names = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(
                schema["properties"]
            )
            return names and all(valid(value[name], schema["properties"][name]) for name in value)
    raise AssertionError(schema)


@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_answers_drawn_at_random_are_json_by_their_schema(
    schema: dict[str, Any], seed: int, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    answer = drawn(grammars, json_grammar(schema), seed)
    assert answer is not None
    value = json.loads(tokenizer.decode(answer))
    assert valid(value, schema), (value, schema)


@given(seed=st.integers(0, 1 << 30), cut=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_follower_of_any_first_part_goes_on_as_the_first_would(
    seed: int, cut: float, grammars: Grammars
) -> None:
    schema = {"type": "object", "properties": {"a": strings(maxLength=9), "b": {"enum": [1, "x"]}}}
    grammar = json_grammar({**schema, "additionalProperties": False})
    answer = drawn(grammars, grammar, seed)
    assert answer is not None
    first, later = grammars.follower(grammar), grammars.follower(grammar)
    begin = int(cut * len(answer))
    for length in range(len(answer) + 1):
        expected = first.allowed(array("i", answer[:length]))
        if length >= begin:
            assert (later.allowed(array("i", answer[:length])) == expected).all()


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex_grammar(r"(ab|c){1,4}é"), r"(ab|c){1,4}é"),
        (regex_grammar("a*"), "a*"),
        (choice_grammar(["yes", "no\n", 'qu"ote', "ü\\"]), 'yes|no\n|qu"ote|ü\\\\'),
        (context_free_grammar('start: "a" x\nx: "b" | "c" x'), "ac*b"),
        (context_free_grammar('root ::= "a" x\nx ::= "b" | "c" x'), "ac*b"),
    ],
    ids=["regex", "may_be_empty", "choice", "lark", "gbnf"],
)
def test_answers_match_expressions_choices_and_grammars(
    grammar: str, pattern: str, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    texts = [tokenizer.decode(drawn(grammars, grammar, seed) or []) for seed in range(20)]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(set(texts)) > 1


def test_special_tokens_come_by_their_name_or_number(grammars: Grammars) -> None:
    assert drawn(grammars, context_free_grammar('start: <|im_start|> "a"'), 1) == [IM_START, 64]
    assert drawn(grammars, context_free_grammar(f"start: <[{IM_START}]>"), 1) == [IM_START]
    text = drawn(grammars, regex_grammar(".{40,50}"), 1)
    assert text is not None
    assert IM_START not in text


def test_after_its_end_an_answer_may_only_end(grammars: Grammars) -> None:
    """With `ignore_eos` the end comes again and again."""
    follower = grammars.follower(choice_grammar(["ca"]))
    answer = array("i")
    for token in (66, 64, EOS, EOS, EOS):
        assert follower.allowed(answer)[token]
        answer.append(token)
    assert follower.allowed(answer).nonzero()[0].tolist() == [EOS]


def test_an_answer_that_does_not_match_is_an_error(grammars: Grammars) -> None:
    follower = grammars.follower(choice_grammar(["ab"]))
    with pytest.raises(GrammarError, match="can't be held to its grammar"):
        follower.allowed(array("i", [64, 64]))
    with pytest.raises(GrammarError):
        follower.allowed(array("i", [64, 64]))


def test_a_grammar_that_costs_too_much_ends_with_an_error(grammars: Grammars) -> None:
    """A bounded string takes some states for each of its characters."""
    follower = grammars.follower(json_grammar(strings(maxLength=100_000)))
    with pytest.raises(GrammarError, match="too many"):
        follower.allowed(array("i", [1, *[64] * 60_000]))


def test_a_bad_grammar_or_tokenizer_is_an_error(grammars: Grammars, tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="unknown special token"):
        grammars.follower(context_free_grammar("start: <nobody>"))
    endless = Grammars(tmp_path / "none.json", SIZE, [])
    with pytest.raises(GrammarError, match="no token that ends"):
        endless.follower(regex_grammar("a"))
    endless.close()
    (tmp_path / "tokenizer.json").write_text("{}")
    broken = Grammars(tmp_path / "tokenizer.json", SIZE, [EOS])
    with pytest.raises(GrammarError, match="tokenizer can't be used"):
        broken.follower(regex_grammar("a"))
    broken.close()


def test_a_sentencepiece_tokenizer_spells_words_and_bytes(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    words = Grammars(tmp_path / "tokenizer.json", 300, [1])
    follower = words.follower(regex_grammar("he(llo)? world"))
    for text in ("hello world", "he world"):
        follower = words.follower(regex_grammar("he(llo)? world"))
        answer = array("i")
        for token in tokenizer.encode(text)[1:]:
            assert follower.allowed(answer)[token]
            answer.append(token)
        assert follower.allowed(answer).nonzero()[0].tolist() == [1]
    words.close()


def test_the_deepest_chains_of_rules_crash_nobody(grammars: Grammars) -> None:
    count = 7000
    rules = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(count)) + f'r{count}: "a"'
    assert drawn(grammars, context_free_grammar(rules), 1) == [64]
    terms = "start: R0\n" + "".join(f'R{i}: "a" R{i + 1}\n' for i in range(count))
    follower = grammars.follower(context_free_grammar(terms + f'R{count}: "b"'))
    assert follower.allowed(array("i")).nonzero()[0].tolist()
    chain: dict[str, Any] = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(2500)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, "d2500": {"const": 1}}}
    assert drawn(grammars, json_grammar(schema), 1) == [16]


def submit(ticket: int, grammar: str) -> Submit:
    sampling = SamplingParams(max_tokens=1, seed=0, grammar=grammar)
    return Submit(ticket=ticket, choice=0, prompt=b"", sampling=sampling)


def test_messages_about_a_prompt_wait_in_order_for_its_grammar(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, inbox = threading.Event(), queue.SimpleQueue[ToWorker]()
    made = Grammars(folder / "tokenizer.json", SIZE, [EOS])
    compile_grammar = Grammars._compile

    def slowly(self: Grammars, grammar: str) -> Any:
        assert go.wait(10)
        return compile_grammar(self, grammar)

    monkeypatch.setattr(module.Grammars, "_compile", slowly)
    porter = Porter(made, inbox.put)
    first: list[ToWorker] = [submit(1, "start: wrong"), Settle(1, accepted=False), Abort(1)]
    others: list[ToWorker] = [
        submit(2, ""),
        Expect(ticket=3, choice=0, prompt=b"", sampling=submit(3, regex_grammar("b")).sampling),
        Settle(3, accepted=True),
        Abort(2),
    ]
    porter.receive(first[0])
    for message in (*others, *first[1:]):
        porter.receive(message)
    assert [inbox.get_nowait() for _ in others] == others
    assert inbox.empty()
    go.set()
    assert [inbox.get(timeout=10) for _ in first] == first
    made.compile(regex_grammar("b")).result(timeout=10)
    porter.receive(submit(4, regex_grammar("b")))
    assert inbox.get_nowait() == submit(4, regex_grammar("b"))
    made.close()
