"""What the measurements of shared prompts run on: real workers, and a scheduler that is told how many.

Prompts are random and never repeat, so no cache holds them.
"""

import dataclasses
import itertools
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np

from memserve.cluster.cluster import Cluster
from memserve.config import ServeConfig
from memserve.generation import Generation
from memserve.launcher import plan_instances, scheduler_config
from memserve.messages import SamplingParams
from memserve.model.prepared import PreparedModel
from memserve.scheduler.interface import Ask, GroupPlan, Placement, SchedulerConfig
from memserve.scheduler.scheduler import Scheduler

FIRST_TOKEN_ID = 1000
"""Below are tokens with a meaning of their own, for some models."""


class Sized(Scheduler):
    """Shares every prompt among `num_ranks` instances; None: as the cost model says."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.num_ranks: int | None = None
        self.order: list[int] = []
        """Instances as they are taken; those that aren't named come last."""
        self.ranks: list[int] = []
        """The instances that the last prompt was given to."""

    def place(self, ask: Ask, now: float) -> Placement:
        """See `Scheduler.place`."""
        if self.num_ranks is not None:
            ask = dataclasses.replace(ask, may_share=False)
        placement = super().place(ask, now)
        if self.num_ranks is not None and self.num_ranks > 1:
            left = [number for number in self.roles() if number not in self.order]
            ranks = [*self.order, *left][: self.num_ranks]
            (chunk,) = self._chooser.chunk_tokens(
                np.zeros(1), len(ask.prompt), np.array([self.num_ranks])
            ).tolist()
            plan = GroupPlan(ranks, chunk, [])
            placement = dataclasses.replace(
                placement,
                prefill=ranks[0],
                decode=ranks[0],
                num_cached_tokens=0,
                fetch=None,
                group=plan,
            )
        self.ranks = placement.group.instances if placement.group else [placement.prefill]
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

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._random = np.random.default_rng(seed)
        self._vocab_size = vocab_size
        self._numbers = itertools.count()

    def generation(self, num_tokens: int, max_tokens: int) -> Generation:
        """One request."""
        prompt = self._random.integers(FIRST_TOKEN_ID, self._vocab_size, num_tokens, dtype=np.int32)
        return Generation(
            request_id=f"bench-{next(self._numbers)}",
            prompt=array("i", prompt.tobytes()),
            sampling=SamplingParams(
                max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True
            ),
        )


@asynccontextmanager
async def cluster(
    prepared: PreparedModel,
    options: Options,
    *,
    num_workers: int,
    max_sp: int,
    sp_min_tokens: int = 1,
) -> AsyncIterator[tuple[Cluster, Sized]]:
    """Mixed workers that share the cores, calibrated."""
    config = ServeConfig(
        mixed=num_workers,
        kv_cache_memory=options.kv_cache_memory,
        max_sp=max_sp,
        sp_min_tokens=sp_min_tokens,
    )
    plans = plan_instances(config, prepared)
    scheduler = Sized(scheduler_config(config, plans[0].engine))
    made = Cluster(
        plans,
        scheduler,
        max_num_queued_reqs=config.max_num_queued_reqs,
        calibration=True,
        max_sp=max_sp,
    )
    async with made.running():
        scheduler.order = by_cores({one.number: one.plan.cores for one in made.instances})
        yield made, scheduler


def by_cores(cores: Mapping[int, Sequence[int]]) -> list[int]:
    """Instances in such an order that the first ones share no core, as far as that goes."""
    met: Counter[int] = Counter()
    order = {}
    for number, own in sorted(cores.items()):
        order[number] = max(met[core] for core in own)
        met.update(own)
    return sorted(order, key=lambda number: (order[number], number))


async def first_token(served: Cluster, asked: Generation) -> float:
    """Seconds until the first token of a request."""
    start = time.perf_counter()
    async with served.generate(asked) as tokens:
        async for _ in tokens:
            return time.perf_counter() - start
    raise AssertionError("a request ended without a token")
