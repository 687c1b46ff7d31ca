"""Grammars that an answer must match: made of what clients send, checked, and compiled.

A grammar travels as one string in llguidance's form: the front end makes and checks it, a worker
compiles it for its tokenizer. Clients are not trusted with them. A grammar's size is bounded, so are
the work of compiling it and that of each token (`limits`), and it is compiled where the stack is deep
enough for any nesting of that size (`deep_thread`): llguidance recurses along chains of rules.

Knows no requests and no sequences.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance

from memserve.errors import MemserveError

MAX_CHARS = 1 << 17
"""Longest grammar. The deepest chain of rules that fits needs some 100 MiB of stack."""

STACK_BYTES = 256 << 20
"""Address space; what is not used takes no memory."""

MAX_REASON = 500
"""Characters of a library's reason that a client is told."""

WHITESPACE = r"( |\r?\n[ \t]{0,64})"
"""Where JSON may have space: one, or the next line's indent. Small models never end a longer one."""


class GrammarError(MemserveError):
    """A grammar is wrong, too large, or can't be followed any further; the sentence says why."""


def json_grammar(schema: Mapping[str, Any], *, whitespace: str | None = WHITESPACE) -> str:
    """JSON that is valid by `schema`, with space by the regular expression `whitespace`; None: none."""
    make, text = llguidance.LLMatcher.grammar_from_json_schema, json.dumps(schema)
    if whitespace is None:
        return make(text, defaults={"whitespace_flexible": False})
    return make(text, defaults={"whitespace_pattern": whitespace})


def regex_grammar(regex: str) -> str:
    """All of the answer matches a regular expression (Rust's syntax)."""
    return llguidance.LLMatcher.grammar_from_regex(regex)


def choice_grammar(choices: Sequence[str]) -> str:
    """The answer is one of these."""
    alternatives = " | ".join(map(literal, choices))
    return llguidance.LLMatcher.grammar_from_lark(f"start: {alternatives}")


def context_free_grammar(text: str) -> str:
    """A grammar in llguidance's form of Lark, or in GBNF (EBNF). Raises `GrammarError`."""
    if len(text) > MAX_CHARS:
        raise GrammarError(f"it is too large: {len(text)} characters, at most {MAX_CHARS}")
    try:
        return llguidance.grammar_from("grammar", text)
    except ValueError as error:
        raise GrammarError(shortened(str(error))) from None


def limits() -> llguidance.LLParserLimits:
    """What one grammar may cost: half a second to compile, milliseconds a token, 100 MB."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=500_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def check_grammar(grammar: str) -> None:
    """Raise `GrammarError` for a grammar that no tokenizer makes good; on a `deep_thread` only.

    Special tokens in it are looked up when a worker compiles it.
    """
    if len(grammar) > MAX_CHARS:
        raise GrammarError(f"it is too large: {len(grammar)} characters, at most {MAX_CHARS}")
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
        grammar, None, limits=limits()
    )
    if failed:
        raise GrammarError(shortened(messages[0]))


def shortened(reason: str) -> str:
    """A library's reason, without the pages of grammar that it may quote."""
    reason = reason.removesuffix("<non-verbose/>").strip()
    return reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + " ..."


def deep_thread() -> ThreadPoolExecutor:
    """An executor of one thread, whose stack is deep enough to compile any grammar."""
    before = threading.stack_size(STACK_BYTES)
    try:
        executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        executor.submit(bool).result()  # it has its thread, and stack, from its first call on
    finally:
        threading.stack_size(before)
    return executor


def literal(text: str) -> str:
    """A text within a rule of Lark."""
    return json.dumps(text, ensure_ascii=False)


def json_schema_rule(schema: Mapping[str, Any]) -> str:
    """The body of a rule of Lark: JSON by a schema, written as `json.dumps` and templates write it."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return "%json " + json.dumps({**schema, "x-guidance": style})
