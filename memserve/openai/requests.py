"""The bodies that clients send, and reading them.

A body is JSON whose known fields must have the right type; unknown fields are ignored. `null` means
that a field was left out. Ranges and combinations are checked in `memserve.openai.validation`.
"""

import logging
import re
from typing import Any, Literal, TypeVar

import msgspec

from memserve.errors import InvalidRequest

logger = logging.getLogger(__name__)


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides the tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """A JSON schema by OpenAI's way to ask for one."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """The form that the answer is asked to have."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """The form that the answer is asked to have, by vLLM's way; one of the first five."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None

    # Known to vLLM's users and not done here.
    structural_tag: Any = None
    disable_additional_properties: bool | None = None


class CommonFields(msgspec.Struct, kw_only=True):
    """What both completion APIs take. `None` is a field that the client left out."""

    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout: float | None = None
    """Seconds after which nobody wants the answer any more."""
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None

    # Known to vLLM's users and not done here: refused, so that nobody takes them for granted.
    prompt_logprobs: int | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: bool | None = None


class CompletionRequest(CommonFields, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message's content; only text is served."""

    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """The function that an assistant called; `arguments` is JSON in a string."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that an assistant made in an earlier turn."""

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A function that the model may call, as the chat template shows it to the model."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool that the model may call."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class ChatRequest(CommonFields, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: either a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


Body = TypeVar("Body", bound=msgspec.Struct)

_PLACE = re.compile(r"^(?P<what>.*?) - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>[^`]+)`")


def read_body(body: bytes, kind: type[Body]) -> Body:
    """The body as a struct of type `kind`.

    Raises `InvalidRequest`, naming the field, for what is no JSON or has a wrong type.
    """
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    if logger.isEnabledFor(logging.DEBUG):
        _log_unknown_fields(body, kind)
    return request


def _wrong_field(message: str) -> InvalidRequest:
    """The client's error for msgspec's sentence about a wrong type or a missing field."""
    place = _PLACE.match(message)
    what, path = (place["what"], place["path"]) if place else (message, "")
    if missing := _MISSING.search(what):
        field = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"The field `{field}` is required.", param=field)
    if not path:
        return InvalidRequest(f"The body is wrong: {what}.")
    subject = f"A key of `{path}`" if place and place["key"] else f"`{path}`"
    return InvalidRequest(f"{subject} is wrong: {what}.", param=path, code="invalid_type")


def _log_unknown_fields(body: bytes, kind: type[msgspec.Struct]) -> None:
    given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    if unknown := sorted(set(given) - set(kind.__struct_encode_fields__)):
        logger.debug("ignored unknown fields of a %s: %s", kind.__name__, ", ".join(unknown))
