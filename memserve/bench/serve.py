"""One load on one running server, from the first look at it to the result."""

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from memserve.bench.client import COMPLETIONS, Client, ModelCard, Request, find_model
from memserve.bench.documents import read_documents, tokenized
from memserve.bench.load import Load, Record
from memserve.bench.results import Metric, Result, Setup, summarize
from memserve.bench.scrape import ServerFigures, between, look, settled_look
from memserve.bench.words import text_of
from memserve.errors import UsageError
from memserve.workloads import Workload, make_sessions, synthetic_tokens

WARM_UP_TOKENS = 64
WARM_UP_ANSWER = 8
CHAT_SHARE = 0.9
"""Of a model's length for a chat's words: the rest is for its template."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to send, where, and how to report it."""

    base_url: str
    workload: Workload
    documents: Path | None = None
    """For `loogle`: real documents instead of drawn ones."""
    endpoint: str = COMPLETIONS
    model: str | None = None
    """None: the server's first."""
    api_key: str | None = None
    max_concurrency: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    num_warmups: int = 1
    timeout: float = 600.0
    """Seconds for one request."""
    extra_body: dict[str, object] = field(default_factory=dict)
    percentiles: Sequence[float] = (99.0,)
    goodput: dict[Metric, float] = field(default_factory=dict)
    """Limits in milliseconds."""
    label: str | None = None


async def bench_serve(
    options: ServeOptions, on_end: Callable[[Record], None]
) -> tuple[Result, Record]:
    """Send the workload and sum up; `on_end` is called after every request.

    Raises `UsageError` if no server answers, a warm-up fails or the workload can't be made. Requests
    that fail later are counted in the result.
    """
    async with open_http(options) as http:
        card = await find_model(http, options.model)
        client = Client(
            http,
            endpoint=options.endpoint,
            model=card.id,
            ignore_eos=options.ignore_eos,
            temperature=options.temperature,
            extra_body=options.extra_body,
        )
        workload = fitted(options.workload, card, chat=not client.takes_token_ids)
        documents = (
            None
            if options.documents is None
            else await tokenized(client, read_documents(options.documents))
        )
        await _warm_up(client, workload, options.num_warmups)
        before = await look(http) if options.num_warmups == 0 else await settled_look(http)
        load = Load(client, workload.vocab, max_concurrency=options.max_concurrency, on_end=on_end)
        record = await load.run(make_sessions(workload, documents))
        after = await settled_look(http)
    server: ServerFigures | None = between(before, after) if before and after else None
    result = summarize(
        _setup(options, workload, card.id),
        record,
        server,
        percentiles=options.percentiles,
        limits=options.goodput,
    )
    return result, record


def open_http(options: ServeOptions) -> aiohttp.ClientSession:
    """Connections to the server, as many as there are requests at once."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return aiohttp.ClientSession(
        options.base_url,
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=options.timeout),
    )


def fitted(workload: Workload, card: ModelCard, *, chat: bool) -> Workload:
    """The workload within the model's length, unless it has a limit of its own."""
    if workload.limits.max_model_len is not None or card.max_model_len is None:
        return workload
    longest = round(card.max_model_len * (CHAT_SHARE if chat else 1))
    limits = dataclasses.replace(workload.limits, max_model_len=longest)
    return dataclasses.replace(workload, limits=limits)


async def _warm_up(client: Client, workload: Workload, times: int) -> None:
    for number in range(times):
        tokens = synthetic_tokens(workload.vocab, WARM_UP_TOKENS, workload.seed, "warm-up", number)
        reply = await client.ask(
            Request(
                prompt=tokens
                if client.takes_token_ids
                else [{"role": "user", "content": text_of(tokens)}],
                max_tokens=WARM_UP_ANSWER,
            )
        )
        if reply.error is not None:
            raise UsageError(f"the warm-up request failed: {reply.error}")


def _setup(options: ServeOptions, workload: Workload, model: str) -> Setup:
    return Setup(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        label=options.label,
        base_url=options.base_url,
        endpoint=options.endpoint,
        model_id=model,
        dataset_name=workload.name,
        num_prompts=workload.num_requests,
        request_rate=None if math.isinf(workload.rate) else workload.rate,
        burstiness=workload.burstiness,
        max_concurrency=options.max_concurrency,
        seed=workload.seed,
        ignore_eos=options.ignore_eos,
        scale=workload.limits.scale,
        think_time=workload.think_time,
        num_shared=workload.num_shared,
        max_input_len=workload.limits.max_input_len,
        max_output_len=workload.limits.max_output_len,
        max_model_len=workload.limits.max_model_len,
    )
