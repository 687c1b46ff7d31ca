"""An OpenAI server of a page: it streams counted tokens, and misbehaves on request."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

METRICS = """\
# TYPE memserve:engine_prefill_tokens_total counter
memserve:engine_prefill_tokens_total{{engine="0"}} {prefilled}
memserve:engine_prefill_tokens_total{{engine="1"}} 5
# TYPE memserve:request_decode_time_seconds histogram
memserve:request_decode_time_seconds_bucket{{le="+Inf"}} {requests}
memserve:request_decode_time_seconds_sum {seconds}
memserve:request_decode_time_seconds_count {requests}
# TYPE memserve:num_requests_running gauge
memserve:num_requests_running 1
"""


@dataclass
class FakeServer:
    """How it answers, and the bodies it got."""

    gives_ids: bool = True
    gives_cached: bool = True
    has_tokenizer: bool = True
    is_memserve: bool = False
    broken_after: int | None = None
    """From this request on, the connection breaks after two tokens."""
    busy_from: int | None = None
    """From this request on, it is overloaded."""
    error_in_stream: bool = False
    token_delay: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What it finds when it recounts its books."""
    num_running: int = 0
    peak_running: int = 0

    @property
    def prompts(self) -> list[Any]:
        return [body.get("prompt", body.get("messages")) for body in self.bodies]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        number = len(self.bodies)
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        if self.busy_from is not None and number >= self.busy_from:
            error = {"error": {"message": "too many requests", "type": "overloaded_error"}}
            return web.json_response(error, status=503)
        self.num_running += 1
        self.peak_running = max(self.peak_running, self.num_running)
        try:
            return await self.stream(request, number)
        finally:
            self.num_running -= 1

    async def stream(self, request: web.Request, number: int) -> web.StreamResponse:
        body = self.bodies[number]
        chat = request.path.endswith("/chat/completions")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if chat:
            await send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for token in range(body["max_tokens"]):
            if self.broken_after is not None and number >= self.broken_after and token == 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            await asyncio.sleep(self.token_delay)
            await send(response, {"choices": [self.choice(body, token, chat=chat)]})
        if self.error_in_stream:
            await send(response, {"error": {"message": "a worker died"}})
        else:
            await send(response, {"choices": [], "usage": self.usage(body, chat=chat)})
        await response.write(b"data: [DONE]\n\n")
        return response

    def choice(self, body: dict[str, Any], token: int, *, chat: bool) -> dict[str, Any]:
        last = token == body["max_tokens"] - 1
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
        if chat:
            return choice | {"delta": {"content": f"t{token} "}}
        choice["text"] = f"t{token} "
        if self.gives_ids and body.get("return_token_ids"):
            choice["token_ids"] = [90_000 + token]
            if token == 0:
                choice["prompt_token_ids"] = body["prompt"]
        return choice

    def usage(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        prompt = 7 if chat else len(body["prompt"])
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": body["max_tokens"],
            "total_tokens": prompt + body["max_tokens"],
        }
        if self.gives_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": prompt // 2}
        return usage

    async def tokenize(self, request: web.Request) -> web.Response:
        if not self.has_tokenizer:
            raise web.HTTPNotFound
        words = (await request.json())["prompt"].split()
        return web.json_response({"tokens": [80_000 + len(word) for word in words]})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake/model", "max_model_len": 4000}]})

    async def metrics(self, request: web.Request) -> web.Response:
        if not self.is_memserve:
            return web.Response(text="# TYPE other_total counter\nother_total 3\n")
        prefilled = sum(len(prompt) for prompt in self.prompts)
        requests = len(self.bodies)
        text = METRICS.format(prefilled=prefilled, requests=requests, seconds=requests * 0.25)
        return web.Response(text=text)

    async def pools(self, _: web.Request) -> web.Response:
        if not self.is_memserve:
            raise web.HTTPNotFound
        return web.json_response(
            {"instances": [{"name": "mixed-0", "stats": {}, "problems": self.problems}]}
        )


async def send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


@asynccontextmanager
async def running(fake: FakeServer) -> AsyncIterator[str]:
    """The server's URL, while the block runs."""
    app = web.Application(client_max_size=1 << 26)
    app.add_routes(
        [
            web.post("/v1/completions", fake.answer),
            web.post("/v1/chat/completions", fake.answer),
            web.post("/tokenize", fake.tokenize),
            web.get("/v1/models", fake.models),
            web.get("/metrics", fake.metrics),
            web.get("/admin/pool", fake.pools),
        ]
    )
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")
