"""Chat templates: messages to a prompt, by the model's own Jinja template, in a sandbox.

What a template finds around it (helpers, white-space control, the special tokens, fields that are
None left out) is what transformers gives it, so that the same template renders the same prompt. A
template that refuses the messages, or breaks on them, is the client's mistake: `InvalidRequest`.

Templates come from the model or the operator, never from a request: the sandbox keeps a template
from the machine, but not from running long.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from memserve.errors import InvalidRequest, UsageError

Message = Mapping[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
RESERVED = ("messages", "tools", "add_generation_prompt")
CONTINUE_HERE = "\ue000continue-here\ue000"
"""Marks the end of the message to be continued; private-use characters that no message needs."""
CONTINUE_HERE_AND_SPACE = CONTINUE_HERE + " "
"""As it is inserted: a template that strips messages shows itself by stripping this space."""


class ChatTemplate:
    """A compiled template and the special tokens that it may use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`.

        With `continue_final_message` the prompt ends with the last message's text, for the model to
        go on with; it excludes `add_generation_prompt`. `template_kwargs` are further variables.
        Raises `InvalidRequest`.
        """
        if not messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message needs add_generation_prompt to be false",
                param="continue_final_message",
            )
        extra = dict(template_kwargs or {})
        if taken := [name for name in RESERVED if name in extra]:
            raise InvalidRequest(
                f"chat_template_kwargs must not set {taken[0]}", param="chat_template_kwargs"
            )
        shown = [_as_templates_expect(message) for message in messages]
        if continue_final_message:
            _mark_end(shown)
        prompt = self._render(
            {**self._special_tokens, **extra}, shown, tools, add_generation_prompt
        )
        return _cut_at_mark(prompt) if continue_final_message else prompt

    def _render(
        self,
        variables: dict[str, Any],
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        try:
            return self._template.render(
                variables,
                messages=messages,
                tools=list(tools) if tools is not None else None,
                documents=variables.get("documents"),
                add_generation_prompt=add_generation_prompt,
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            # Any of these means: the template was not written for messages of this form.
            raise InvalidRequest(
                f"the model's chat template can't render these messages: {error}", param="messages"
            ) from error


def _as_templates_expect(message: Message) -> dict[str, Any]:
    """A copy without null fields, its reasoning under the name that templates read."""
    shown = {name: value for name, value in message.items() if value is not None}
    reasoning = [shown[name] for name in REASONING_FIELDS if name in shown]
    if reasoning:
        shown = {"thinking": reasoning[0], **shown, "reasoning_content": reasoning[0]}
    return shown


def _mark_end(messages: list[dict[str, Any]]) -> None:
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + CONTINUE_HERE_AND_SPACE
        return
    parts = list(content) if isinstance(content, list | tuple) else []
    for place, part in reversed(list(enumerate(parts))):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts[place] = {**part, "text": part["text"] + CONTINUE_HERE_AND_SPACE}
            last["content"] = parts
            return
    raise InvalidRequest("the final message has no text to continue", param="messages")


def _cut_at_mark(prompt: str) -> str:
    before, mark, after = prompt.rpartition(CONTINUE_HERE)
    if not mark:
        raise InvalidRequest(
            "the model's chat template drops the final message, so it can't be continued",
            param="continue_final_message",
        )
    return before if after.startswith(" ") else before.rstrip()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (an instance variable by jinja2's types)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    helpers: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(helpers)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
