"""`memserve chat`: a conversation in the terminal with a running server, streamed."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import click

from memserve.errors import UsageError

SSE_PREFIX = b"data: "


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What the flags of `memserve chat` say."""

    url: str
    model: str | None
    system: str | None
    api_key: str | None
    temperature: float
    max_tokens: int | None


def run_chat(options: ChatOptions) -> None:
    """Read a line, stream the answer, until end of input or Ctrl-C."""
    try:
        asyncio.run(_converse(options))
    except KeyboardInterrupt:
        click.echo()
    except aiohttp.ClientConnectionError:
        raise UsageError(f"no server answers at {options.url}") from None


async def _converse(options: ChatOptions) -> None:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(options.url, headers=headers, timeout=timeout) as session:
        model = options.model or await _first_model(session)
        click.echo(f"chatting with {model}; an empty line or Ctrl-D ends")
        messages: list[dict[str, str]] = []
        if options.system:
            messages.append({"role": "system", "content": options.system})
        while question := await asyncio.to_thread(_ask):
            messages.append({"role": "user", "content": question})
            answer = ""
            async for piece in _stream(session, _body(options, model, messages)):
                click.echo(piece, nl=False)
                answer += piece
            click.echo()
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return str(click.prompt("you", prompt_suffix="> ", default="", show_default=False))
    except click.Abort:
        return ""


def _body(options: ChatOptions, model: str, messages: list[dict[str, str]]) -> dict[str, object]:
    body: dict[str, object] = {
        "model": model,
        "messages": messages,
        "temperature": options.temperature,
        "stream": True,
    }
    if options.max_tokens is not None:
        body["max_tokens"] = options.max_tokens
    return body


async def _first_model(session: aiohttp.ClientSession) -> str:
    async with session.get("/v1/models") as response:
        await _require_success(response)
        listing = await response.json()
    return str(listing["data"][0]["id"])


async def _stream(session: aiohttp.ClientSession, body: dict[str, object]) -> AsyncIterator[str]:
    """The pieces of text of one streamed answer."""
    async with session.post("/v1/chat/completions", json=body) as response:
        await _require_success(response)
        async for line in response.content:
            data = line.removeprefix(SSE_PREFIX).strip()
            if not line.startswith(SSE_PREFIX) or data == b"[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise UsageError(f"the server failed: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""


async def _require_success(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        try:
            reason = (await response.json())["error"]["message"]
        except (aiohttp.ContentTypeError, json.JSONDecodeError, KeyError, TypeError):
            reason = await response.text()
        raise UsageError(f"the server answered {response.status}: {reason}")
