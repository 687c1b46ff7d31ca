"""A client of OpenAI's completion APIs that times every token of a streamed answer.

Works with memserve, vLLM, SGLang and llama.cpp. What it sends beyond OpenAI's fields: `ignore_eos`
(understood by all four), and `return_token_ids` for prompts of token ids (memserve and vLLM answer
it, the others ignore it). Times are seconds of `time.perf_counter`.

A failed request is an outcome, not an exception: `Reply.error` says what happened.
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import msgspec

from memserve.bench.words import Message
from memserve.errors import UsageError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
SESSION_HEADER = "X-Session-Id"
"""Tells memserve which requests are turns of one conversation; other servers ignore it."""


class Details(msgspec.Struct):
    """Part of the usage; absent from servers that don't tell."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What the server counted."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: Details | None = None


class Delta(msgspec.Struct):
    """What is new in a chat's answer."""

    content: str | None = None


class ChunkChoice(msgspec.Struct):
    """One answer's part of a chunk, of either API."""

    text: str | None = None
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class ErrorDetail(msgspec.Struct):
    """OpenAI's error."""

    message: str = ""


class Chunk(msgspec.Struct):
    """One event of a stream, of either API."""

    choices: list[ChunkChoice] = []
    usage: Usage | None = None
    error: ErrorDetail | None = None


class Tokenized(msgspec.Struct):
    """Answer of /tokenize."""

    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: a prompt of token ids for `/v1/completions`, or messages for the chat API."""

    prompt: list[int] | list[Message]
    max_tokens: int
    session_id: str = ""


@dataclass(kw_only=True)
class Reply:
    """What came back, and when."""

    sent_at: float
    ttft: float | None = None
    """Seconds to the first token; None if none came."""
    latency: float = 0.0
    """Seconds to the end of the stream."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between chunks with tokens."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_chunks: int = 0
    usage: Usage | None = None
    finished: bool = False
    error: str | None = None
    _latest: float = 0.0

    @property
    def num_output_tokens(self) -> int:
        """By the server's count, else by the ids it sent, else by its chunks."""
        if self.usage is not None:
            return self.usage.completion_tokens
        return len(self.token_ids) or self.num_chunks

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens whose prefill was skipped; None if the server doesn't tell."""
        if self.usage is None or self.usage.prompt_tokens_details is None:
            return None
        return self.usage.prompt_tokens_details.cached_tokens

    def absorb(self, chunk: Chunk, now: float) -> None:
        """Add one event that came at `now`."""
        if chunk.error is not None:
            self.error = f"in the stream: {chunk.error.message}"
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            text = choice.text or (choice.delta.content if choice.delta else None) or ""
            if text or choice.token_ids or choice.finish_reason:
                self._token(now, empty=not text and not choice.token_ids)
            self.text += text
            self.token_ids += choice.token_ids or ()
            self.finished = self.finished or choice.finish_reason is not None

    def _token(self, now: float, *, empty: bool) -> None:
        if self.ttft is None:
            self.ttft = now - self.sent_at
        elif not empty:
            self.gaps.append(now - self._latest)
        self._latest = now
        self.num_chunks += not empty


class Client:
    """Sends requests to one server over one pool of connections."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        *,
        endpoint: str,
        model: str,
        ignore_eos: bool,
        temperature: float,
        extra_body: dict[str, object],
    ) -> None:
        self._http = http
        self._endpoint = endpoint
        self._common: dict[str, object] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": temperature,
        }
        if ignore_eos:
            self._common["ignore_eos"] = True
        if self.takes_token_ids:
            self._common["return_token_ids"] = True
        self._common |= extra_body

    @property
    def takes_token_ids(self) -> bool:
        """Prompts are token ids, not messages."""
        return not self._endpoint.endswith("/chat/completions")

    async def ask(self, request: Request) -> Reply:
        """Send one request and read its answer to the end."""
        subject = "prompt" if self.takes_token_ids else "messages"
        body = msgspec.json.encode(
            self._common | {subject: request.prompt, "max_tokens": request.max_tokens}
        )
        headers = {"Content-Type": "application/json"}
        if request.session_id:
            headers[SESSION_HEADER] = request.session_id
        reply = Reply(sent_at=time.perf_counter())
        try:
            async with self._http.post(self._endpoint, data=body, headers=headers) as response:
                if response.status == 200:
                    await _read(response, reply)
                else:
                    reply.error = f"{response.status}: {await reason_of(response)}"
        except TimeoutError:
            reply.error = "no answer in time"
        except (aiohttp.ClientError, OSError) as error:
            reply.error = f"connection: {error or type(error).__name__}"
        except msgspec.DecodeError as error:
            reply.error = f"unreadable answer: {error}"
        reply.latency = time.perf_counter() - reply.sent_at
        return reply

    async def tokenize(self, text: str) -> list[int] | None:
        """The server's own tokens of a text, without special ones; None if it can't say."""
        # vLLM's and memserve's field names, and llama.cpp's.
        body = {
            "prompt": text,
            "content": text,
            "add_special_tokens": False,
            "add_special": False,
        }
        try:
            async with self._http.post("/tokenize", json=body) as response:
                if response.status != 200:
                    return None
                return msgspec.json.decode(await response.read(), type=Tokenized).tokens
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
            return None


async def _read(response: aiohttp.ClientResponse, reply: Reply) -> None:
    done = False
    async for data in events(response):
        now = time.perf_counter()
        if data == b"[DONE]":
            done = True
        elif data:
            reply.absorb(msgspec.json.decode(data, type=Chunk), now)
    if reply.error is None and not (done or reply.finished):
        reply.error = "the stream broke off"
    if reply.error is None and reply.ttft is None:
        reply.error = "the answer has no token"


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of server-sent events. A line may be long: a first chunk may repeat the prompt."""
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def reason_of(response: aiohttp.ClientResponse) -> str:
    """What an answer that is no success says."""
    body = await response.read()
    try:
        error = msgspec.json.decode(body, type=Chunk).error
    except msgspec.DecodeError:
        error = None
    return error.message if error else body[:200].decode(errors="replace").strip()


class ModelCard(msgspec.Struct):
    """One model of a server."""

    id: str
    max_model_len: int | None = None
    """None: the server doesn't tell."""


class _Models(msgspec.Struct):
    data: list[ModelCard]


async def find_model(http: aiohttp.ClientSession, name: str | None) -> ModelCard:
    """The model of this name, or the server's first.

    Raises `UsageError` if no server answers, or it lists no model and none was named.
    """
    try:
        async with http.get("/v1/models") as response:
            body = await response.read()
            if response.status != 200:
                raise UsageError(f"{response.url} answered {response.status}")
        cards = msgspec.json.decode(body, type=_Models).data
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UsageError(f"no server answers: {error or type(error).__name__}") from None
    except msgspec.DecodeError:
        cards = []
    if name is not None:
        return next((card for card in cards if card.id == name), ModelCard(name))
    if not cards:
        raise UsageError("the server lists no model: name one with --model")
    return cards[0]
