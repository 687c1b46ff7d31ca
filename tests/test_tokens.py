"""Text to tokens and back: the launcher's tokenizer, the detokenizer, stop strings."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from memserve.errors import InvalidRequest, UsageError
from memserve.model.prepared import PreparedModel
from memserve.tokens import Detokenizer, StopChecker, Tokenizer
from tests.fakes import prepared_folder, word_tokenizer

TEXTS = [
    "In 1999, 12345 people paid $3.14 at 10:30\n 7 of 8",
    "  indented\n\n\tdef f(x):\n        return x  # don't\r\n",
    "Съешь ещё этих мягких булок, 日本語のテキスト, 한국어, العربية, हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u00a0",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "",
]
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello. How can I help? "},
]


@pytest.fixture(scope="module")
def demo(demo_model: PreparedModel) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.fixture(scope="module")
def reference(demo_model: PreparedModel) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model.weights)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return word_tokenizer(tmp_path_factory.mktemp("sentencepiece"))


def _stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def _with_added(folder: Path, *tokens: AddedToken) -> Tokenizer:
    """A tokenizer of single characters and these added tokens."""
    characters = ["<unk>", *"abc <>x|"]
    vocab = {character: token_id for token_id, character in enumerate(characters)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.add_special_tokens(list(tokens))
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(prepared_folder(folder))


# ── Tokenizer ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_the_demo_model_is_encoded_and_decoded_as_transformers_does(
    demo: Tokenizer, reference: Any, text: str, special: bool
) -> None:
    ids = demo.encode(text, add_special_tokens=special)
    assert ids == reference(text, add_special_tokens=special).input_ids
    assert demo.decode(ids, skip_special_tokens=special) == reference.decode(
        ids, skip_special_tokens=special
    )


def test_a_text_cut_at_its_boundaries_is_encoded_as_a_whole(
    demo: Tokenizer, sentencepiece: Tokenizer
) -> None:
    found: set[Tokenizer] = set()
    piece = st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "</s>", "<|", "</s", "|>", " hello", "world", " ", "\n", "é"]
    )

    @settings(deadline=None)
    @given(st.lists(piece | st.text(max_size=4), max_size=8).map("".join))
    def check(text: str) -> None:
        for tokenizer in (demo, sentencepiece):
            whole = tokenizer.encode(text, add_special_tokens=False)
            for place in tokenizer.boundaries(text):
                found.add(tokenizer)
                parts = (text[:place], text[place:])
                ids = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
                assert ids[0] + ids[1] == whole

    check()
    assert found == {demo, sentencepiece}


def test_of_overlapping_added_tokens_the_longest_from_the_left_cuts(tmp_path: Path) -> None:
    tokenizer = _with_added(tmp_path, AddedToken("<a"), AddedToken("<a|b>"), AddedToken("b>x"))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("c<a|b>xb>x<a")] == [
        *("c", "<a|b>", "x", "b>x", "<a"),
    ]
    assert tokenizer.boundaries("c<a|b>xb>x<a") == [1, 7, 10]
    assert tokenizer.boundaries("<a|b>") == []


def test_no_cut_is_exact_before_a_token_that_takes_the_space_before_it(tmp_path: Path) -> None:
    tokenizer = _with_added(tmp_path, AddedToken("<a>", lstrip=True), AddedToken("<b>"))
    assert len(tokenizer.encode("c <a>")) == 2
    assert tokenizer.boundaries("c <a> <b>") == [6]


def test_a_tokenizer_that_looks_around_its_tokens_has_no_boundaries(tmp_path: Path) -> None:
    tokenizer = _with_added(tmp_path, AddedToken("ab", single_word=True), AddedToken("<b>"))
    assert len(tokenizer.encode("ab<b>")) == 2
    assert len(tokenizer.encode("cab<b>")) == 4
    assert tokenizer.boundaries("ab<b>") == []


def test_the_demo_model_splits_digits_from_the_space_before_them(demo: Tokenizer) -> None:
    # What llama.cpp and the published tokenizer do; the plain GGUF conversion does not.
    pieces = [demo.token_text(token_id) for token_id in demo.encode("a\n 42")]
    assert pieces == ["a", "ĊĠ", "4", "2"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
def test_the_demo_models_chats_are_rendered_as_transformers_does(
    demo: Tokenizer, reference: Any, arguments: dict[str, Any]
) -> None:
    expected = reference.apply_chat_template(CHAT, tokenize=False, **arguments)
    assert demo.render_chat(CHAT, **arguments) == expected
    assert "named SmolLM" in expected


def test_a_template_finds_the_helpers_that_transformers_offers(
    demo: Tokenizer, reference: Any
) -> None:
    template = """{{ bos_token }}{%- for m in messages -%}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- generation %}{{ m.role }}={{ m.content }}{% endgeneration %}
    {% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ mood }}{{ strftime_now('%Y') }}"""
    tools = [{"type": "function", "function": {"name": "größe", "description": "<a> & 'b'"}}]
    chat = [*CHAT, {"role": "skip", "content": "no"}]
    assert demo.render_chat(
        chat, tools=tools, template=template, template_kwargs={"mood": "gut"}
    ) == reference.apply_chat_template(
        chat, tools=tools, chat_template=template, tokenize=False, mood="gut"
    )


def test_a_message_that_a_template_strips_is_continued_without_its_last_spaces(
    demo: Tokenizer, reference: Any
) -> None:
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    arguments: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    expected = reference.apply_chat_template(
        CHAT, chat_template=template, tokenize=False, **arguments
    )
    assert demo.render_chat(CHAT, template=template, **arguments) == expected
    assert expected.endswith("help?")


def test_null_fields_are_left_out_and_reasoning_has_one_name(demo: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.content is defined }} {{ m.reasoning_content }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": None, "reasoning": "hm"}]
    assert demo.render_chat(messages, template=template) == "False hm"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "not valid Jinja"),
    ],
)
def test_a_template_that_fails_is_the_requests_mistake(
    demo: Tokenizer, template: str, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        demo.render_chat(CHAT, template=template)


@pytest.mark.parametrize(
    "arguments",
    [
        {"messages": []},
        {"messages": CHAT, "continue_final_message": True},
        {"messages": CHAT, "template_kwargs": {"messages": []}},
        {
            "messages": [{"role": "user", "content": None}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ],
)
def test_contradictory_chat_arguments_are_refused(
    demo: Tokenizer, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        demo.render_chat(**arguments)


def test_a_model_without_a_template_says_what_to_do(sentencepiece: Tokenizer) -> None:
    assert not sentencepiece.has_chat_template
    with pytest.raises(InvalidRequest, match="--chat-template"):
        sentencepiece.render_chat(CHAT)


def test_tools_take_the_template_for_tools_where_there_is_one(tmp_path: Path) -> None:
    word_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "tool_use_template.jinja").write_text("tools")
    tokenizer = Tokenizer(prepared_folder(tmp_path))
    assert tokenizer.render_chat(CHAT) == "plain"
    assert tokenizer.render_chat(CHAT, tools=[{"type": "function"}]) == "tools"
    replaced = Tokenizer(prepared_folder(tmp_path), chat_template="{{ eos_token }}")
    assert replaced.render_chat(CHAT, tools=[{"type": "function"}]) == "</s>"


def test_a_broken_template_of_the_operator_is_refused_at_start(tmp_path: Path) -> None:
    word_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="line 1"):
        Tokenizer(prepared_folder(tmp_path), chat_template="{% if %}")


def test_tokens_import_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'huggingface_hub'}"
    code = f"import sys, memserve.tokens; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ── Detokenizer ──────────────────────────────────────────────────────────────────────────────────


@given(text=st.text(max_size=60))
def test_streamed_pieces_join_to_the_text_byte_level(demo: Tokenizer, text: str) -> None:
    ids = demo.encode(text)
    for skip in (True, False):
        assert "".join(_stream(demo, ids, skip=skip)) == demo.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 49151), max_size=12))
def test_streamed_pieces_join_to_the_text_for_any_tokens(demo: Tokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        assert "".join(_stream(demo, ids, skip=skip)) == demo.decode(ids, skip_special_tokens=skip)


@given(text=st.text(alphabet=st.sampled_from("helo wrd é日🙂 \n"), max_size=40))
def test_streamed_pieces_join_to_the_text_sentencepiece(
    sentencepiece: Tokenizer, text: str
) -> None:
    ids = sentencepiece.encode(text)
    assert "".join(_stream(sentencepiece, ids)) == sentencepiece.decode(ids) == text


@pytest.mark.parametrize("kind", ["demo", "sentencepiece"])
def test_no_piece_shows_a_part_of_a_character(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    text = "hello 🙂👩‍👩‍👧 日本 ẞ€"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split())  # several tokens a character
    pieces = _stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_an_unfinished_character_shows_only_at_the_end(sentencepiece: Tokenizer) -> None:
    ids = [*sentencepiece.encode("hello"), *sentencepiece.encode("🙂")[-4:-2]]
    *pieces, last = _stream(sentencepiece, ids)
    assert "".join(pieces) == "hello"
    assert set(last) == {"\ufffd"}


def test_endless_bytes_that_are_no_text_are_not_hoarded(demo: Tokenizer) -> None:
    (lead,) = {ids[0] for ids in (demo.encode("ẞ"), demo.encode("ẟ"))}
    assert demo.decode([lead]) == "\ufffd"
    detokenizer = Detokenizer(demo)
    pieces = [detokenizer.push(lead) for _ in range(200)]
    assert len("".join(pieces)) > 150
    # and real text after it is whole again
    rest = [detokenizer.push(token_id) for token_id in demo.encode("ẞ fine")]
    assert "".join(rest).endswith("ẞ fine")


def test_special_tokens_are_left_out_unless_wanted(demo: Tokenizer) -> None:
    ids = demo.encode("a<|im_end|>b")
    assert "".join(_stream(demo, ids)) == "ab"
    assert "".join(_stream(demo, ids, skip=False)) == "a<|im_end|>b"


# ── StopChecker ──────────────────────────────────────────────────────────────────────────────────


def _check(stops: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, str | None]:
    checker = StopChecker(stops, include_in_output=include)
    emitted = ""
    for piece in pieces:
        text, stop = checker.push(piece)
        emitted += text
        if stop is not None:
            return emitted, stop
    return emitted + checker.flush(), None


def _first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """By its meaning: grow the text a character at a time until a stop string ends it."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end - len(longest), end, longest
    return None


short_text = st.text(alphabet="ab ", max_size=12)


@given(
    pieces=st.lists(short_text, max_size=8),
    stops=st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_a_text_ends_at_its_first_complete_stop_wherever_it_is_cut(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    text = "".join(pieces)
    found = _first_stop(text, stops)
    expected: tuple[str, str | None] = (text, None)
    if found:
        start, end, stop = found
        expected = (text[: end if include else start], stop)
    assert _check(stops, pieces, include=include) == expected


def test_what_may_begin_a_stop_string_is_held_back_and_no_more() -> None:
    checker = StopChecker(["\n\nUser:", "###"])
    assert checker.push("Hello #") == ("Hello ", None)
    assert checker.push("1\n") == ("#1", None)
    assert checker.push("\nUse") == ("", None)
    assert checker.push("ful") == ("\n\nUseful", None)
    assert checker.push("!##") == ("!", None)
    assert checker.push("# rest") == ("", "###")


def test_without_stop_strings_nothing_is_held_back() -> None:
    checker = StopChecker([])
    assert checker.push("abc") == ("abc", None)
    assert checker.flush() == ""
