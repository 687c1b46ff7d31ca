"""What the tests of this folder let happen, and what must hold afterwards."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

from memserve.cluster.cluster import Cluster
from memserve.scheduler.interface import Role
from memserve.stats import EngineStats
from tests.faults.plan import Action, Fault, Faults
from tests.workers.rig import PLAIN, answer, assert_all_home, generation, oracle_answer

PREFILL_DECODE = (Role.PREFILL, Role.DECODE)
TWO_MIXED = (Role.MIXED, Role.MIXED)
PREFILL, DECODE = 0, 1
DOCUMENT = [7, *range(40)]
RETURNING = dataclasses.replace(PLAIN, context_caching="3")


def fails(at: str, error: str = "PoolError") -> Fault:
    return Fault(at=at, action=Action.FAIL, error=error)


def tears(at: str) -> Fault:
    return Fault(at=at, action=Action.TEAR)


def holds(at: str) -> Fault:
    return Fault(at=at, action=Action.HOLD)


def armed(*faults: Fault) -> Faults:
    made = Faults()
    for fault in faults:
        made.arm(fault)
    return made


async def stats_of(cluster: Cluster) -> list[EngineStats]:
    return [report.inspection.stats for report in await cluster.inspect()]


async def ask(cluster: Cluster, number: int, prompt: list[int], num_tokens: int = 8) -> None:
    """The answer must be that of any undisturbed run."""
    async with asyncio.timeout(30):
        got = await answer(cluster, generation(number, prompt, num_tokens))
    assert got == [oracle_answer(prompt, num_tokens)]


async def assert_well(cluster: Cluster) -> None:
    """All is back, all serve, and the next request is right."""
    await assert_all_home(cluster)
    async with asyncio.timeout(20):
        while cluster.down():
            await asyncio.sleep(0.01)
    assert cluster.problems() == []
    await ask(cluster, 999, [3, *range(25)])
    await assert_all_home(cluster)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.005)
