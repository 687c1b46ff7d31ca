"""Calls of tools are read out of any text however it is cut, and grammars demand good ones."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.openai.requests import FunctionDefinition
from memserve.openai.tools import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    Call,
    ToolParser,
    ToolSyntax,
    calls_grammar,
    choose_syntax,
    read_calls,
)
from memserve.tokens import Tokenizer
from memserve.workers.grammars import Grammars
from tests.fakes import EOS, VOCAB_SIZE, byte_tokenizer
from tests.grammars import drawn

LOOK = '{"name": "look", "arguments": {"at": "ä\\n</x>"}}'
WAIT = '{"name": "wait", "arguments": {}}'
LOOK_CALL = Call("look", '{"at": "ä\\n</x>"}')
WAIT_CALL = Call("wait", "{}")


def parse(syntax: ToolSyntax, *pieces: str) -> tuple[str, list[Call]]:
    """What is said and called in an answer that comes in pieces."""
    parser = ToolParser(syntax)
    found = [one for piece in pieces for one in parser.push(piece)] + parser.flush()
    assert parser.num_calls == sum(isinstance(one, Call) for one in found)
    return (
        "".join(one for one in found if isinstance(one, str)),
        [one for one in found if isinstance(one, Call)],
    )


@pytest.mark.parametrize(
    ("syntax", "text", "said", "calls"),
    [
        (HERMES, "Hello\n", "Hello\n", []),
        (HERMES, f"<tool_call>\n{LOOK}\n</tool_call>", "", [LOOK_CALL]),
        (
            HERMES,
            f"I look.\n\n<tool_call>{LOOK}</tool_call>\n<tool_call>\n{WAIT}\n</tool_call>\n",
            "I look.",
            [LOOK_CALL, WAIT_CALL],
        ),
        (HERMES, f"<tool_call>{WAIT}</tool_call> then", " then", [WAIT_CALL]),
        (HERMES, "<tool_call>no</tool_call>", "<tool_call>no</tool_call>", []),
        (HERMES, f"a <tool_call>\n{LOOK}", f"a<tool_call>\n{LOOK}", []),
        (HERMES, "a <tool_c", "a <tool_c", []),
        (HERMES, "<tool_call>[1]</tool_call>!", "<tool_call>[1]</tool_call>!", []),
        (MISTRAL, f"[TOOL_CALLS][{LOOK}, {WAIT}]", "", [LOOK_CALL, WAIT_CALL]),
        (MISTRAL, f"Well [TOOL_CALLS] [{WAIT}]\n", "Well", [WAIT_CALL]),
        (MISTRAL, f"[TOOL_CALLS][{LOOK}", f"[TOOL_CALLS][{LOOK}", []),
        (LLAMA3_JSON, '{"name": "wait", "parameters": {}}', "", [WAIT_CALL]),
        (LLAMA3_JSON, f"<|python_tag|>{LOOK}; {WAIT}", "", [LOOK_CALL, WAIT_CALL]),
        (LLAMA3_JSON, '\n{"a": 1}', '\n{"a": 1}', []),
        (LLAMA3_JSON, f"Not {WAIT}", f"Not {WAIT}", []),
    ],
)
def test_calls_are_told_from_text(
    syntax: ToolSyntax, text: str, said: str, calls: list[Call]
) -> None:
    assert parse(syntax, text) == (said, calls)


PARTS = st.sampled_from(
    [
        *("a", " ", "\n", "<", "<tool", "<tool_call>", "</tool_call>", "{", "}", '{"a": 1}', "; "),
        *("[TOOL_CALLS]", "[TOOL", f"[{WAIT}]", "<|python_tag|>", LOOK, WAIT, "]", ", "),
        *(f"<tool_call>\n{LOOK}\n</tool_call>", f"<tool_call>{WAIT}</tool_call>"),
    ]
)


@given(
    syntax=st.sampled_from([HERMES, MISTRAL, LLAMA3_JSON]),
    text=st.lists(PARTS, max_size=8).map("".join),
    data=st.data(),
)
@settings(max_examples=400, deadline=None)
def test_however_a_text_is_cut_it_says_and_calls_the_same(
    syntax: ToolSyntax, text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(syntax, text)
    assert parse(syntax, *pieces) == whole
    assert parse(syntax, *text) == whole
    said, calls = whole
    if not calls:
        assert "".join(said.split()) == "".join(text.split())


def test_no_markup_is_told_before_its_call_is_known() -> None:
    parser = ToolParser(HERMES)
    told = [parser.push(letter) for letter in f"Hm.\n<tool_call>\n{LOOK}\n</tool_call>"]
    assert [one for some in told for one in some] == ["H", "m", ".", LOOK_CALL]
    assert told[-1] == [LOOK_CALL]
    assert parser.flush() == []


def test_json_that_is_no_call_is_none() -> None:
    wrong = ["", "1", "{}", '{"name": 1}', '{"name": "f", "arguments": 1}', "[" * 5000, f"{WAIT} a"]
    assert [read_calls(text, HERMES) for text in wrong] == [None] * len(wrong)


def test_the_syntax_is_the_templates_unless_it_is_named() -> None:
    assert choose_syntax("auto", None) is None
    assert choose_syntax("auto", "{{ messages }}") is None
    assert choose_syntax("auto", "... <tool_call>\n ...") is HERMES
    assert choose_syntax("auto", "<tool_call><function=name>") is None
    assert choose_syntax("auto", "[TOOL_CALLS] [") is MISTRAL
    assert choose_syntax("auto", "[TOOL_CALLS]name[ARGS]") is None
    assert choose_syntax("auto", '{"name": f, "parameters": p} ipython') is LLAMA3_JSON
    assert choose_syntax("mistral", "<tool_call>") is MISTRAL


TOOLS = [
    FunctionDefinition(
        name='get "it"',
        parameters={
            "properties": {"n": {"$ref": "#/$defs/n"}, "ü": {"enum": ["a", "é"]}},
            "required": ["n"],
            "additionalProperties": False,
            "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 30}},
        },
    ),
    FunctionDefinition(name="wait"),
]


@pytest.fixture(scope="module", params=["spelled", "tokens", "special_tokens"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tokenizer, Grammars]]:
    """The markers of calls are text, tokens of their own, or special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = byte_tokenizer(folder)
    markers = [
        mark for one in (HERMES, MISTRAL, LLAMA3_JSON) for mark in (one.start, one.end) if mark
    ]
    if request.param == "tokens":
        made._backend.add_tokens(markers)
    if request.param == "special_tokens":
        made._backend.add_special_tokens(markers)
    made._backend.save(str(folder / "tokenizer.json"))
    added = {
        token.content: number for number, token in made._backend.get_added_tokens_decoder().items()
    }
    made._added = added
    grammars = Grammars(folder / "tokenizer.json", VOCAB_SIZE + len(markers), [EOS])
    yield made, grammars
    grammars.close()


@pytest.mark.parametrize("syntax", [HERMES, MISTRAL, LLAMA3_JSON], ids=lambda one: one.name)
@pytest.mark.parametrize("parallel", [False, True])
def test_demanded_calls_are_read_back(
    tokenizer: tuple[Tokenizer, Grammars], syntax: ToolSyntax, parallel: bool
) -> None:
    encoder, grammars = tokenizer
    grammar = calls_grammar(TOOLS, syntax, encoder, parallel=parallel)
    numbers, names = set(), set()
    for seed in range(25):
        answer = drawn(grammars, grammar, seed)
        assert answer is not None
        text = encoder.decode(answer, skip_special_tokens=False)
        said, calls = parse(syntax, text)
        assert said == "", text
        numbers.add(len(calls))
        for call in calls:
            names.add(call.name)
            arguments: dict[str, Any] = json.loads(call.arguments)
            assert call.arguments in text
            if call.name == "wait":
                assert arguments == {}
            else:
                assert 1 <= arguments["n"] <= 30
    assert names == {'get "it"', "wait"}
    assert 0 not in numbers
    assert (max(numbers) > 1) == parallel
