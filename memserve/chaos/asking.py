"""Sends one request of any kind and keeps all that comes back, with the time of every token.

Both completion APIs, streamed or not, any number of choices. A failed request is an outcome, not an
exception: `Answer.error` says what happened. Times are seconds of `time.perf_counter`.
"""

import time
from dataclasses import dataclass, field

import aiohttp
import msgspec

from memserve.bench.client import CHAT, COMPLETIONS, ErrorDetail, Usage, events, reason_of

__all__ = ["CHAT", "COMPLETIONS", "Answer", "Asked", "Choice", "ask"]

REQUEST_ID_HEADER = "X-Request-Id"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, but for what makes a repeat of it another one."""

    kind: str
    """For people: what is tested by it."""
    endpoint: str
    body: dict[str, object]

    @property
    def streamed(self) -> bool:
        """Whether its answer comes token by token."""
        return bool(self.body.get("stream"))


@dataclass(kw_only=True)
class Choice:
    """What has come of one choice."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    times: list[float] = field(default_factory=list)
    """Of the chunks that brought tokens."""

    @property
    def longest_gap(self) -> float | None:
        """Most seconds between two chunks; None if there were fewer than two."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max((after - before for before, after in pairs), default=None)


@dataclass(kw_only=True)
class Answer:
    """What has come back."""

    prompt: list[int] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Usage | None = None
    left: bool = False
    """Whether the client went away before the end."""
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Of all choices."""
        return sum(len(choice.tokens) for choice in self.choices.values())


class _TokenLogprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    """Of a completion the first, of a chat the second."""

    token_logprobs: list[float] = []
    content: list[_TokenLogprob] = []


class _Message(msgspec.Struct):
    content: str | None = None


class _Part(msgspec.Struct):
    """A choice, or what is new in it, of either API."""

    index: int
    text: str | None = None
    message: _Message | None = None
    delta: _Message | None = None
    logprobs: _Logprobs | None = None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    finish_reason: str | None = None


class _Body(msgspec.Struct):
    """An answer, or an event of a stream."""

    choices: list[_Part] = []
    prompt_token_ids: list[int] = []
    usage: Usage | None = None
    error: ErrorDetail | None = None


async def ask(
    http: aiohttp.ClientSession,
    asked: Asked,
    *,
    request_id: str,
    salt: str = "",
    leave_after: int | None = None,
) -> Answer:
    """Send one request; go away after `leave_after` tokens, if that is given and it streams.

    `salt` parts its history in the cache from that of others, and changes nothing else.
    """
    extra: dict[str, object] = {"return_token_ids": True}
    if asked.streamed:
        extra["stream_options"] = {"include_usage": True}
    if salt:
        extra["cache_salt"] = salt
    data = msgspec.json.encode(asked.body | extra)
    headers = {"Content-Type": "application/json", REQUEST_ID_HEADER: request_id}
    answer = Answer()
    try:
        async with http.post(asked.endpoint, data=data, headers=headers) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {await reason_of(response)}"
            elif asked.streamed:
                await _read_stream(response, answer, leave_after)
            else:
                _absorb(answer, await response.read())
    except TimeoutError:
        answer.error = "no answer in time"
    except (aiohttp.ClientError, OSError) as error:
        answer.error = f"connection: {error or type(error).__name__}"
    except msgspec.DecodeError as error:
        answer.error = f"unreadable answer: {error}"
    if answer.error is None and not answer.left:
        answer.error = _what_is_missing(answer)
    return answer


async def _read_stream(
    response: aiohttp.ClientResponse, answer: Answer, leave_after: int | None
) -> None:
    if leave_after == 0:
        answer.left = True
        response.close()
        return
    done = False
    async for data in events(response):
        if data == b"[DONE]":
            done = True
        elif data:
            _absorb(answer, data)
        if leave_after is not None and answer.num_tokens >= leave_after and not done:
            answer.left = True
            response.close()
            return
    if not done and answer.error is None:
        answer.error = "the stream broke off"


def _absorb(answer: Answer, data: bytes) -> None:
    body = msgspec.json.decode(data, type=_Body)
    if body.error is not None:
        answer.error = f"in the stream: {body.error.message}"
    now = time.perf_counter()
    answer.usage = body.usage or answer.usage
    answer.prompt = body.prompt_token_ids or answer.prompt
    for part in body.choices:
        answer.prompt = part.prompt_token_ids or answer.prompt
        choice = answer.choices.setdefault(part.index, Choice())
        message = part.message or part.delta
        choice.text += part.text or (message.content if message else None) or ""
        choice.tokens += part.token_ids
        if part.logprobs is not None:
            choice.logprobs += part.logprobs.token_logprobs
            choice.logprobs += [token.logprob for token in part.logprobs.content]
        choice.finish_reason = part.finish_reason or choice.finish_reason
        if part.token_ids:
            choice.times.append(now)


def _what_is_missing(answer: Answer) -> str | None:
    """Why an answer that came to its end isn't whole; None if it is."""
    if not answer.choices or answer.usage is None or not answer.prompt:
        return "the answer is not whole"
    unfinished = [index for index, one in answer.choices.items() if one.finish_reason is None]
    return f"choice {unfinished[0]} has no end" if unfinished else None
