"""A conversation turned into the text of a prompt.

Messages are checked and put into the form that Hugging Face chat templates take. Only text is
served; images and sounds are refused.
"""

from typing import Any

import msgspec

from memserve.errors import InvalidRequest
from memserve.openai.requests import ChatMessage, ChatRequest, TokenizeRequest, ToolCall
from memserve.openai.validation import not_supported
from memserve.tokens import Tokenizer


def render_conversation(request: ChatRequest | TokenizeRequest, tokenizer: Tokenizer) -> str:
    """The prompt's text, by the server's chat template.

    Raises `InvalidRequest` for messages that can't be rendered.
    """
    if request.chat_template is not None:
        raise not_supported("chat_template", why="the server's own template is used")
    if not request.messages:
        raise InvalidRequest("`messages` is empty.", param="messages")
    continues = bool(request.continue_final_message)
    if continues and request.add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` exclude each other.",
            param="continue_final_message",
        )
    template_kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        template_kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    tools = request.tools
    return tokenizer.render_chat(
        [_message(message, index) for index, message in enumerate(request.messages)],
        tools=[msgspec.to_builtins(tool) for tool in tools] if tools else None,
        add_generation_prompt=not continues and request.add_generation_prompt is not False,
        continue_final_message=continues,
        template_kwargs=template_kwargs,
    )


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates take it: text content, tool arguments as objects."""
    field = f"messages[{index}]"
    if message.content is None and message.role != "assistant":
        raise InvalidRequest(f"`{field}.content` is required.", param=f"{field}.content")
    # OpenAI's newer name of the role; templates know the older one.
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": _content(message, field)}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        rendered["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        rendered["tool_calls"] = [_tool_call(call, field) for call in message.tool_calls]
    return rendered


def _content(message: ChatMessage, field: str) -> str:
    """The text of a message; its text parts are joined by line ends, as vLLM does."""
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        place = f"{field}.content[{index}]"
        if isinstance(part, str):
            texts.append(part)
        elif part.type != "text":
            raise _not_text(place, part.type)
        elif part.text is None:
            raise InvalidRequest(f"`{place}.text` is required.", param=f"{place}.text")
        else:
            texts.append(part.text)
    return "\n".join(texts)


def _not_text(place: str, kind: str) -> InvalidRequest:
    """The error for an image or a sound in a message."""
    return InvalidRequest(
        f"`{place}` is of type {kind!r}; this server takes text only.",
        param=f"{place}.type",
        code="unsupported",
    )


def _tool_call(call: ToolCall, field: str) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            place = f"{field}.tool_calls"
            raise InvalidRequest(
                f"The arguments of a call in `{place}` are not a JSON object.", param=place
            ) from None
    function = {"name": call.function.name, "arguments": arguments or {}}
    rendered: dict[str, Any] = {"type": "function", "function": function}
    return rendered if call.id is None else {"id": call.id, **rendered}
