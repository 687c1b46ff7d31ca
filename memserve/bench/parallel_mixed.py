"""Chats beside documents that several workers share, or that none share: what either does to the other.

Chats come at random, a document at regular times, for a while.
"""

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from memserve.bench.parallel_setup import Options, Prompts, cluster, first_token
from memserve.cluster.cluster import Cluster
from memserve.config import ServeConfig
from memserve.generation import Generation
from memserve.model.prepared import PreparedModel


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
    prompts = Prompts(options.seed + 1, prepared.vocab_size)
    chance = np.random.default_rng(options.seed)
    async with cluster(
        prepared,
        options,
        num_workers=options.num_workers,
        max_sp=max_sp,
        sp_min_tokens=ServeConfig().sp_min_tokens,
    ) as (served, scheduler):
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
