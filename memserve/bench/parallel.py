"""Sequence parallelism measured: real workers, no HTTP between.

Three questions. How long is one prompt's first token away with 1, 2, ... ranks, beside one worker that
has all the cores; what do ranks read of each other, beside what the plan of their slices says; how
evenly are they busy. Which number of ranks does the cost model choose, and how far is that from the
best. And what does sharing prompts do to others: short chats beside long documents, with it and
without.

Prompts are random and never repeat, so no cache holds them. Times are the launcher's, from the request
to its first token. Every measurement is repeated in turns, medians are compared.
"""

import asyncio
import dataclasses
import itertools
import logging
import statistics
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np

from memserve.cluster.cluster import Cluster
from memserve.config import ServeConfig
from memserve.generation import Generation
from memserve.launcher import plan_instances, scheduler_config
from memserve.messages import SamplingParams
from memserve.model.prepared import PreparedModel
from memserve.scheduler.interface import Ask, GroupPlan, Placement, SchedulerConfig
from memserve.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.3
"""After so long the workers have told their counters."""

LAST_TOKEN_ID = 40_000
TICKS_PER_S = 100.0


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt length."""

    num_tokens: int
    all_cores: float
    """Median seconds to the first token with one worker on all cores."""
    by_ranks: dict[int, float]
    """The same by the number of one-core workers that shared the prompt."""
    chosen: int
    """Ranks that the cost model chose."""
    speedup: float
    """Of the most ranks over one."""
    loss: float
    """The chosen number's time over the best one's."""
    remote_bytes: float
    """What the most ranks read of each other in place, for one prompt."""
    planned_bytes: float
    """What the plan of their slices says."""
    formula_bytes: float
    """tokens * (ranks - 1) * bytes of a token's KV: each rank reads all others' once."""
    balance: float
    """The busiest rank's processor time over the mean."""


class Mixed(msgspec.Struct, frozen=True, kw_only=True):
    """Chats beside documents."""

    max_sp: int
    num_groups: int
    long_ttft_p50: float
    long_ttft_p99: float
    short_ttft_p99: float
    short_tpot_p50: float
    short_tpot_p99: float
    short_longest_gap: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    model: str
    num_workers: int
    repeats: int
    first_tokens: list[FirstToken]
    mixed: list[Mixed]


class Sized(Scheduler):
    """Shares every prompt among `num_ranks` instances; None: as the cost model says."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.num_ranks: int | None = None
        self.num_chosen = 1

    def place(self, ask: Ask, now: float) -> Placement:
        """See `Scheduler.place`."""
        if self.num_ranks is not None:
            ask = dataclasses.replace(ask, may_share=False)
        placement = super().place(ask, now)
        if self.num_ranks is not None and self.num_ranks > 1:
            first = placement.prefill
            others = [number for number in self.roles() if number != first]
            ranks = [first, *others[: self.num_ranks - 1]]
            (chunk,) = self._chooser.chunk_tokens(
                np.zeros(1), len(ask.prompt), np.array([self.num_ranks])
            ).tolist()
            plan = GroupPlan(ranks, chunk, [])
            placement = dataclasses.replace(
                placement, decode=first, num_cached_tokens=0, fetch=None, group=plan
            )
        self.num_chosen = len(placement.group.instances) if placement.group else 1
        return placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    lengths: tuple[int, ...]
    num_workers: int = 2
    repeats: int = 3
    seed: int = 0
    kv_cache_memory: str = "1G"
    mixed_seconds: float = 30.0
    chat_rate: float = 1.5
    document_every: float = 4.0
    document_tokens: int = 3000


class Prompts:
    """Random prompts, each of which is new."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._numbers = itertools.count()

    def generation(self, num_tokens: int, max_tokens: int) -> Generation:
        """One request."""
        prompt = self._random.integers(1000, LAST_TOKEN_ID, num_tokens, dtype=np.int32)
        return Generation(
            request_id=f"bench-{next(self._numbers)}",
            prompt=array("i", prompt.tobytes()),
            sampling=SamplingParams(
                max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True
            ),
        )


@asynccontextmanager
async def cluster(
    prepared: PreparedModel, options: Options, *, num_workers: int, max_sp: int
) -> AsyncIterator[tuple[Cluster, Sized]]:
    """Mixed workers that share the cores, calibrated."""
    config = ServeConfig(
        mixed=num_workers,
        kv_cache_memory=options.kv_cache_memory,
        max_sp=max_sp,
        sp_min_tokens=1,
    )
    scheduler = Sized(scheduler_config(config))
    made = Cluster(
        plan_instances(config, prepared),
        scheduler,
        max_num_queued_reqs=config.max_num_queued_reqs,
        calibration=True,
        max_sp=max_sp,
    )
    async with made.running():
        yield made, scheduler


async def first_token(served: Cluster, asked: Generation) -> float:
    """Seconds until the first token of a request."""
    start = time.perf_counter()
    async with served.generate(asked) as tokens:
        async for _ in tokens:
            return time.perf_counter() - start
    raise AssertionError("a request ended without a token")


async def measure(prepared: PreparedModel, options: Options) -> list[FirstToken]:
    """Every length, alone on the machine."""
    prompts = Prompts(options.seed)
    alone: dict[int, float] = {}
    async with cluster(prepared, options, num_workers=1, max_sp=1) as (served, _):
        await first_token(served, prompts.generation(256, 1))
        for length in options.lengths:
            times = [
                await first_token(served, prompts.generation(length, 1))
                for _ in range(options.repeats)
            ]
            alone[length] = statistics.median(times)
    async with cluster(prepared, options, num_workers=options.num_workers, max_sp=0) as (
        served,
        scheduler,
    ):
        for scheduler.num_ranks in range(1, options.num_workers + 1):
            await first_token(served, prompts.generation(1024, 1))
        return [
            await _measure_length(served, scheduler, prompts, options, length, alone[length])
            for length in options.lengths
        ]


async def _measure_length(
    served: Cluster,
    scheduler: Sized,
    prompts: Prompts,
    options: Options,
    length: int,
    all_cores: float,
) -> FirstToken:
    sizes = range(1, options.num_workers + 1)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    most = options.num_workers
    busy = [0.0] * most
    for _ in range(options.repeats):
        for scheduler.num_ranks in sizes:
            before = processor_seconds(served)
            times[scheduler.num_ranks].append(
                await first_token(served, prompts.generation(length, 1))
            )
            if scheduler.num_ranks == most:
                after = processor_seconds(served)
                busy = [total + b - a for total, a, b in zip(busy, before, after, strict=True)]
    scheduler.num_ranks = most
    remote, planned = await _exchanged(served, prompts, length)
    scheduler.num_ranks = None
    await first_token(served, prompts.generation(length, 1))
    chosen = scheduler.num_chosen
    by_ranks = {size: statistics.median(each) for size, each in times.items()}
    token_bytes = served.instances[0].block_bytes / served.plan.engine.block_size
    log.info("%d tokens: %s, chosen %d", length, by_ranks, chosen)
    return FirstToken(
        num_tokens=length,
        all_cores=all_cores,
        by_ranks=by_ranks,
        chosen=chosen,
        speedup=by_ranks[1] / by_ranks[most],
        loss=by_ranks[chosen] / min(by_ranks.values()),
        remote_bytes=remote,
        planned_bytes=planned,
        formula_bytes=length * (most - 1) * token_bytes,
        balance=max(busy) / max(1e-9, statistics.mean(busy)),
    )


async def _exchanged(served: Cluster, prompts: Prompts, length: int) -> tuple[float, float]:
    """Bytes that ranks read of each other for one prompt, and what the plan says."""
    counters = served.scheduler.counters
    await asyncio.sleep(HEARTBEAT_S)
    remote = sum(one.stats.num_remote_bytes for one in served.instances)
    planned = counters.num_shared_blocks
    await first_token(served, prompts.generation(length, 1))
    await asyncio.sleep(HEARTBEAT_S)
    remote = sum(one.stats.num_remote_bytes for one in served.instances) - remote
    return remote, (counters.num_shared_blocks - planned) * served.instances[0].block_bytes


def processor_seconds(served: Cluster) -> list[float]:
    """Processor time of each worker since it started."""
    found = []
    for instance in served.instances:
        assert instance.process is not None
        fields = Path(f"/proc/{instance.process.pid}/stat").read_text().rpartition(")")[2].split()
        found.append((int(fields[11]) + int(fields[12])) / TICKS_PER_S)
    return found


# Chats beside documents


@dataclasses.dataclass(slots=True)
class _Timed:
    """One request's times."""

    ttft: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)


async def _timed(served: Cluster, asked: Generation) -> _Timed:
    start = latest = time.perf_counter()
    found = _Timed()
    async with served.generate(asked) as tokens:
        async for item in tokens:
            now = time.perf_counter()
            if item.event.position:
                found.gaps.append(now - latest)
            else:
                found.ttft = now - start
            latest = now
    return found


async def mixed(prepared: PreparedModel, options: Options, *, max_sp: int) -> Mixed:
    """Chats that come at random, and a document at regular times, for a while."""
    prompts, chance = Prompts(options.seed + 1), np.random.default_rng(options.seed)
    async with cluster(prepared, options, num_workers=options.num_workers, max_sp=max_sp) as (
        served,
        scheduler,
    ):
        await first_token(served, prompts.generation(1024, 1))
        scheduler.counters.num_groups.clear()

        async def later(seconds: float, asked: Generation) -> _Timed:
            await asyncio.sleep(seconds)
            return await _timed(served, asked)

        chats, documents, at = [], [], 0.0
        async with asyncio.TaskGroup() as running:
            while (
                at := at + float(chance.exponential(1 / options.chat_rate))
            ) < options.mixed_seconds:
                asked = prompts.generation(int(chance.integers(64, 257)), 48)
                chats.append(running.create_task(later(at, asked)))
            for number in range(int(options.mixed_seconds / options.document_every)):
                asked = prompts.generation(options.document_tokens, 8)
                start = (number + 0.5) * options.document_every
                documents.append(running.create_task(later(start, asked)))
        short = [task.result() for task in chats]
        long = [task.result() for task in documents]
        tpots = [statistics.mean(each.gaps) for each in short if each.gaps]
        return Mixed(
            max_sp=max_sp,
            num_groups=sum(scheduler.counters.num_groups.values()),
            long_ttft_p50=percentile([each.ttft for each in long], 50),
            long_ttft_p99=percentile([each.ttft for each in long], 99),
            short_ttft_p99=percentile([each.ttft for each in short], 99),
            short_tpot_p50=percentile(tpots, 50),
            short_tpot_p99=percentile(tpots, 99),
            short_longest_gap=max(gap for each in short for gap in each.gaps),
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Of a few values: the smallest that so many percent don't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


HEAD = (
    "| max_sp | groups | documents' TTFT p50, p99 (s) | chats' TTFT p99 (s) "
    "| chats' TPOT p50, p99 (ms) | longest gap (ms) |"
)


def render(report: Report) -> str:
    """Two tables."""
    sizes = range(1, report.num_workers + 1)
    lines = [
        f"{report.model}: TTFT of one prompt (s), median of {report.repeats}",
        "",
        "| tokens | one worker, all cores | "
        + " | ".join(f"m = {size}" for size in sizes)
        + " | speed-up | chosen | loss | read of others (MB) | plan | each once | balance |",
        "|---" * (9 + report.num_workers - 1) + "|",
    ]
    for row in report.first_tokens:
        times = " | ".join(f"{row.by_ranks[size]:.3f}" for size in sizes)
        lines.append(
            f"| {row.num_tokens} | {row.all_cores:.3f} | {times} | {row.speedup:.2f} | {row.chosen} | "
            f"{row.loss:.2f} | {row.remote_bytes / 1e6:.1f} | {row.planned_bytes / 1e6:.1f} | "
            f"{row.formula_bytes / 1e6:.1f} | {row.balance:.2f} |"
        )
    if report.mixed:
        lines += [
            "",
            HEAD,
            "|---|---|---|---|---|---|",
        ]
    for each in report.mixed:
        lines.append(
            f"| {each.max_sp} | {each.num_groups} | {each.long_ttft_p50:.2f}, "
            f"{each.long_ttft_p99:.2f} | {each.short_ttft_p99:.2f} | "
            f"{1e3 * each.short_tpot_p50:.0f}, {1e3 * each.short_tpot_p99:.0f} | "
            f"{1e3 * each.short_longest_gap:.0f} |"
        )
    return "\n".join(lines)
