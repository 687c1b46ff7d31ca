"""What launcher and workers keep does not grow with what was ever asked (scenario F6, unit part)."""

import asyncio
import dataclasses
import random
from collections import Counter

from memserve.cluster.cluster import Cluster
from memserve.generation import Generation
from memserve.scheduler.interface import Role
from tests.census import census
from tests.workers.rig import (
    PLAIN,
    RigOptions,
    ThreadWorker,
    answer,
    assert_all_home,
    generation,
    rig,
)

FIRST, SECOND = 250, 750
TAGS = "FairOrder._ends"
"""One for each tenant or session up to a bound: `tests/scheduler/test_fairness.py`."""


def distinct(number: int, random_: random.Random) -> Generation:
    """A request like no other: prompt, lengths, salt, session and tenant."""
    prompt = random_.choices(range(50), k=random_.randint(1, 60))
    asked = generation(number, prompt, random_.randint(1, 9), choices=random_.choice((1, 2)))
    return dataclasses.replace(
        asked,
        cache_salt=f"salt {number}" if number % 3 else "",
        session=f"session {number}",
        tenant=f"tenant {number}" if number % 2 else "",
        priority=number % 40 - 20,
    )


async def ask_all(cluster: Cluster, numbers: range) -> None:
    random_ = random.Random(numbers.start)
    for first in range(numbers.start, numbers.stop, 25):
        several = [distinct(number, random_) for number in range(first, first + 25)]
        await asyncio.gather(*(answer(cluster, asked) for asked in several))


async def test_f6_containers_have_a_size_that_no_number_of_requests_exceeds() -> None:
    options = RigOptions(
        roles=(Role.PREFILL, Role.PREFILL, Role.DECODE),
        num_blocks=48,
        num_dram_blocks=40,
        scheduler=dataclasses.replace(
            PLAIN, routing_policy="cost", fetch_policy="always", context_caching="3"
        ),
    )
    workers: list[ThreadWorker] = []

    async def sizes() -> Counter[str]:
        await assert_all_home(cluster)
        while cluster.returns.num_under_way:
            await asyncio.sleep(0.01)
        return census(cluster, *(worker.engine for worker in workers))

    async with rig(options, workers=workers) as cluster:
        await ask_all(cluster, range(FIRST))
        before = await sizes()
        await ask_all(cluster, range(FIRST, FIRST + SECOND))
        after = await sizes()
    assert before[TAGS] > 0
    num_blocks = len(options.roles) * (options.num_blocks + options.num_dram_blocks)
    larger = {
        name: (before[name], size)
        for name, size in after.items()
        if size > max(1.3 * before[name] + 20, before[name] and num_blocks) and name != TAGS
    }
    assert not larger
