"""How families of models write calls of tools: what their text means, and a grammar that demands one.

    hermes       <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as there are calls
    mistral      [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], to the end of the answer
    llama3_json  {"name": ..., "parameters": {...}}, all of the answer; more calls after semicolons

Text that looks like a call and is none stays text. A call is told when it is whole. Arguments are
written anew, as chat templates write them when the client sends the call back.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from memserve.grammar import json_schema_rule, literal
from memserve.openai.requests import FunctionDefinition
from memserve.tokens import Tokenizer

NO_PARAMETERS: dict[str, Any] = {"properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """How one family writes calls."""

    name: str
    start: str
    """What stands before a call, or several."""
    end: str
    """What stands behind it; empty: the end of the answer."""
    before: str
    """Between start and the first call, as the family's templates write it."""
    between: str
    after: str
    arguments: str
    """Name of the field with the arguments."""
    bare: bool = False
    """Whether calls need no start: an answer that begins as JSON may be one."""


HERMES = ToolSyntax(
    "hermes",
    start="<tool_call>",
    end="</tool_call>",
    before="\n",
    between="\n",
    after="\n",
    arguments="arguments",
)
MISTRAL = ToolSyntax(
    "mistral",
    start="[TOOL_CALLS]",
    end="",
    before="[",
    between=", ",
    after="]",
    arguments="arguments",
)
LLAMA3_JSON = ToolSyntax(
    "llama3_json",
    start="<|python_tag|>",
    end="",
    before="",
    between="; ",
    after="",
    arguments="parameters",
    bare=True,
)
SYNTAXES = {syntax.name: syntax for syntax in (HERMES, MISTRAL, LLAMA3_JSON)}


def choose_syntax(wanted: str, template: str | None) -> ToolSyntax | None:
    """The family that is wanted by name; with `auto` the one that a chat template tells of."""
    if wanted != "auto":
        return SYNTAXES.get(wanted)
    template = template or ""
    # Templates of newer Mistral models write [TOOL_CALLS]name[ARGS]{...}, which nobody reads here.
    if MISTRAL.start in template:
        return None if "[ARGS]" in template else MISTRAL
    if HERMES.start in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    return LLAMA3_JSON if "ipython" in template and '"parameters"' in template else None


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the model wants called, with arguments in JSON."""

    name: str
    arguments: str


@final
class ToolParser:
    """Text of one answer as it comes, turned into what is said and what is called.

    However the text is cut, the pieces of text, joined, and the calls are the same.
    """

    def __init__(self, syntax: ToolSyntax) -> None:
        self._syntax = syntax
        self._held = ""
        self._inside = False
        self._begun = False
        """Whether any text has been said."""
        self.num_calls = 0

    def push(self, text: str) -> list[str | Call]:
        """What the next text completes."""
        self._held += text
        found: list[str | Call] = []
        while self._take(found):
            pass
        return found

    def flush(self) -> list[str | Call]:
        """What was held back: the answer has ended."""
        syntax, held, self._held = self._syntax, self._held, ""
        if self._inside:
            body = held.removeprefix(syntax.start)
            calls = None if syntax.end else read_calls(body, syntax)
            if calls is not None:
                self.num_calls += len(calls)
                return [*calls]
        elif self.num_calls and not held.strip():
            return []  # the line end behind a call
        return [held] if held else []

    def _take(self, found: list[str | Call]) -> bool:
        """Take what can be told from what is held; False if more must come first."""
        if not self._inside:
            return self._say(found)
        end = self._syntax.end
        at = self._held.find(end) if end else -1
        if at < 0:
            return False
        self._inside = False
        whole, self._held = self._held[: at + len(end)], self._held[at + len(end) :]
        calls = read_calls(whole[len(self._syntax.start) : at], self._syntax)
        self.num_calls += len(calls or [])
        found += calls if calls is not None else [whole]
        return True

    def _say(self, found: list[str | Call]) -> bool:
        """Tell the text before a call, but for the space before it; True at the call."""
        syntax, held = self._syntax, self._held
        first = held.lstrip()
        if syntax.bare and not self._begun and first.startswith("{"):
            self._inside = True
            return True
        at = held.find(syntax.start)
        kept = held[:at].rstrip() if at >= 0 else held[: len(held) - self._num_open(held)]
        if kept:
            self._begun = True
            found.append(kept)
        self._held = held[at:] if at >= 0 else held[len(kept) :]
        self._inside = at >= 0
        return self._inside

    def _num_open(self, text: str) -> int:
        """Characters at the end of `text` that may be space before a call, or the start of one."""
        start = self._syntax.start
        size = min(len(text), len(start) - 1)
        part = next((n for n in range(size, 0, -1) if text.endswith(start[:n])), 0)
        return len(text) - len(text[: len(text) - part].rstrip())


_BETWEEN = re.compile(r"[\s;,]*")


def read_calls(text: str, syntax: ToolSyntax) -> list[Call] | None:
    """The calls that a text is made of; None if it is anything else."""
    decoder, at, items = json.JSONDecoder(), 0, list[Any]()
    text = text.strip()
    try:
        while at < len(text):
            item, at = decoder.raw_decode(text, at)
            items += item if isinstance(item, list) else [item]
            at = _match_end(at, text)
    except (ValueError, RecursionError):
        return None
    calls = [_call(item, syntax) for item in items]
    known = [call for call in calls if call is not None]
    return known if known and len(known) == len(calls) else None


def _match_end(at: int, text: str) -> int:
    match = _BETWEEN.match(text, at)
    assert match is not None
    return match.end()


def _call(item: object, syntax: ToolSyntax) -> Call | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get(syntax.arguments, item.get("arguments", {}))
    if not isinstance(arguments, dict):
        return None
    return Call(item["name"], json.dumps(arguments, ensure_ascii=False))


def calls_grammar(
    tools: Sequence[FunctionDefinition], syntax: ToolSyntax, tokenizer: Tokenizer, *, parallel: bool
) -> str:
    """One call of one of the tools, or with `parallel` several calls, and nothing else."""
    start = "" if syntax.bare else _marker(syntax.start, tokenizer)
    end = _marker(syntax.end, tokenizer) if syntax.end else ""
    one = f"{start} {literal(syntax.before)} call {literal(syntax.after)} {end}"
    several = f"one ({literal(syntax.between)} one)*"
    if not syntax.end:  # one start for all calls
        one, several = "call", f"call ({literal(syntax.between)} call)*"
        several = f"{start} {literal(syntax.before)} {several} {literal(syntax.after)}"
    rules = [
        f"start: {several}" if parallel else f"start: {_only(one, start, syntax)}",
        *([f"one: {one}"] if syntax.end else []),
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{syntax.arguments}": '
        schema = NO_PARAMETERS if tool.parameters is None else tool.parameters
        rules.append(f'call_{number}: {literal(head)} args_{number} "}}"')
        rules.append(f"args_{number}: {json_schema_rule({**schema, 'type': 'object'})}")
    return "\n".join(rules)


def _only(one: str, start: str, syntax: ToolSyntax) -> str:
    if syntax.end:
        return "one"
    return f"{start} {literal(syntax.before)} {one} {literal(syntax.after)}"


def _marker(text: str, tokenizer: Tokenizer) -> str:
    """A marker as a token of its own, where the tokenizer has one; spelled out else."""
    number = tokenizer.added_token_id(text)
    return literal(text) if number is None else f"<[{number}]>"
