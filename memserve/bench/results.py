"""What a load's outcomes add up to: latencies, throughputs, hit rate, goodput.

Latencies are over completed requests. TTFT: to the first token. TPOT: mean per token after the first,
by request. ITL: between chunks with tokens, over all requests. E2EL: to the answer's end; the paper
calls it the job completion time, JCT. Fields in JSON have the names of `vllm bench serve`, and more.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from memserve.bench.load import AnswerIds, Outcome, Record
from memserve.bench.scrape import ServerFigures
from memserve.errors import UsageError

Metric = Literal["ttft", "tpot", "itl", "e2el"]
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "itl", "e2el")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One latency over all requests, in milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for; stands in the result as it is."""

    date: str
    label: str | None
    base_url: str
    endpoint: str
    model_id: str
    dataset_name: str
    num_prompts: int
    request_rate: float | None
    """Sessions a second; None: all at once, or at a trace's own times."""
    burstiness: float
    max_concurrency: int | None
    seed: int
    ignore_eos: bool
    scale: float
    think_time: float = 0.0
    num_shared: int = 2
    max_input_len: int | None = None
    max_output_len: int | None = None
    max_model_len: int | None = None
    """Limits that were in force, the server's own among them."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One load's result."""

    setup: Setup
    duration: float
    completed: int
    failed: int
    skipped: int
    """Turns not sent because an earlier turn of their session failed."""
    num_sessions: int
    total_input_tokens: int
    total_output_tokens: int
    total_cached_tokens: int | None
    """None: the server doesn't tell."""
    max_concurrent_requests: int
    good: int | None
    """Completed requests that kept every limit of `goodput`; None: no limits given."""
    answer_ids: AnswerIds
    latencies: dict[Metric, Figures]
    server: ServerFigures | None
    """None: not a memserve server, or its /metrics can't be read."""
    errors: dict[str, int]
    """How often each error came."""

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens that the server had cached."""
        if self.total_cached_tokens is None or not self.total_input_tokens:
            return None
        return self.total_cached_tokens / self.total_input_tokens

    def per_second(self, amount: float) -> float:
        """An amount over the load's duration."""
        return amount / self.duration if self.duration else 0.0


def summarize(
    setup: Setup,
    record: Record,
    server: ServerFigures | None,
    *,
    percentiles: Sequence[float],
    limits: dict[Metric, float],
) -> Result:
    """The result of a load; `limits` are of goodput, in milliseconds."""
    done = [outcome for outcome in record.outcomes if outcome.error is None]
    known = [outcome.cached_tokens for outcome in done if outcome.cached_tokens is not None]
    errors: dict[str, int] = {}
    for outcome in record.outcomes:
        if outcome.error is not None:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    samples = {metric: values(metric, done) for metric in METRICS}
    return Result(
        setup=setup,
        duration=record.duration,
        completed=len(done),
        failed=len(record.outcomes) - len(done),
        skipped=record.num_skipped,
        num_sessions=len({outcome.session_id for outcome in record.outcomes}),
        total_input_tokens=sum(outcome.prompt_tokens for outcome in done),
        total_output_tokens=sum(outcome.output_tokens for outcome in done),
        total_cached_tokens=sum(known) if known else None,
        max_concurrent_requests=record.peak_running,
        good=sum(keeps(limits, outcome) for outcome in done) if limits else None,
        answer_ids=record.answer_ids,
        latencies={
            metric: figures(seconds, percentiles) for metric, seconds in samples.items() if seconds
        },
        server=server,
        errors=errors,
    )


def values(metric: Metric, outcomes: Sequence[Outcome]) -> list[float]:
    """A latency of every request that has it (of `itl`, every gap), in seconds."""
    match metric:
        case "ttft":
            return [outcome.ttft for outcome in outcomes if outcome.ttft is not None]
        case "tpot":
            return [tpot for outcome in outcomes if (tpot := outcome.tpot) is not None]
        case "itl":
            return [gap for outcome in outcomes for gap in outcome.gaps]
        case "e2el":
            return [outcome.latency for outcome in outcomes]


def figures(seconds: Sequence[float], percentiles: Sequence[float]) -> Figures:
    """Mean, median, deviation and percentiles; of at least one value."""
    ms = np.asarray(seconds) * 1e3
    return Figures(
        mean=float(ms.mean()),
        median=float(np.median(ms)),
        std=float(ms.std()),
        percentiles={p: float(np.percentile(ms, p)) for p in percentiles},
    )


def keeps(limits: dict[Metric, float], outcome: Outcome) -> bool:
    """Whether a completed request kept every limit (milliseconds); one without a TPOT keeps that."""
    for metric, limit in limits.items():
        if any(seconds * 1e3 > limit for seconds in values(metric, [outcome])):
            return False
    return True


def as_json(result: Result, record: Record | None = None) -> dict[str, object]:
    """The result as vLLM's benchmark writes it; with `record`, also every request's own figures."""
    flat: dict[str, object] = msgspec.to_builtins(result.setup)
    flat |= {
        "request_rate": "inf" if result.setup.request_rate is None else result.setup.request_rate,
        "duration": result.duration,
        "completed": result.completed,
        "failed": result.failed,
        "skipped": result.skipped,
        "num_sessions": result.num_sessions,
        "total_input_tokens": result.total_input_tokens,
        "total_output_tokens": result.total_output_tokens,
        "total_cached_tokens": result.total_cached_tokens,
        "cache_hit_rate": result.hit_rate,
        "request_throughput": result.per_second(result.completed),
        "request_goodput": None if result.good is None else result.per_second(result.good),
        "slo_attainment": attainment(result),
        "output_throughput": result.per_second(result.total_output_tokens),
        "total_token_throughput": result.per_second(
            result.total_input_tokens + result.total_output_tokens
        ),
        "max_concurrent_requests": result.max_concurrent_requests,
        "answer_ids": result.answer_ids,
    }
    for metric, of in result.latencies.items():
        flat |= {
            f"mean_{metric}_ms": of.mean,
            f"median_{metric}_ms": of.median,
            f"std_{metric}_ms": of.std,
        }
        flat |= {f"p{p:g}_{metric}_ms": value for p, value in of.percentiles.items()}
    flat["server"] = msgspec.to_builtins(result.server)
    flat["error_counts"] = result.errors
    if record is not None:
        flat |= _details(record.outcomes)
    return flat


def attainment(result: Result) -> float | None:
    """Share of all requests, sent or skipped, that were good; None without limits."""
    if result.good is None:
        return None
    asked = result.completed + result.failed + result.skipped
    return result.good / asked if asked else math.nan


def _details(outcomes: Sequence[Outcome]) -> dict[str, object]:
    ordered = sorted(outcomes, key=lambda outcome: outcome.start)
    return {
        "session_ids": [outcome.session_id for outcome in ordered],
        "turns": [outcome.turn for outcome in ordered],
        "input_lens": [outcome.prompt_tokens for outcome in ordered],
        "output_lens": [outcome.output_tokens for outcome in ordered],
        "cached_lens": [outcome.cached_tokens for outcome in ordered],
        "start_times": [outcome.start for outcome in ordered],
        "ttfts": [outcome.ttft for outcome in ordered],
        "itls": [outcome.gaps for outcome in ordered],
        "latencies": [outcome.latency for outcome in ordered],
        "errors": [outcome.error for outcome in ordered],
    }


def write_json(folder: Path, name: str | None, setup: Setup, body: dict[str, object]) -> Path:
    """Write a result and return its path; without a name, one that tells rate, model and time.

    Raises `UsageError` if the file can't be written.
    """
    rate = "inf" if setup.request_rate is None else f"{setup.request_rate:g}"
    model = setup.model_id.rpartition("/")[2]
    stamp = setup.date.replace(":", "").replace("+0000", "")
    path = folder / (name or f"{setup.label or 'memserve'}-{rate}qps-{model}-{stamp}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(body) + b"\n")
    except OSError as error:
        raise UsageError(f"can't write the result: {error}") from None
    return path
