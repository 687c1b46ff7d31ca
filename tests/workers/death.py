"""Killing a worker of `rig`, and waiting for what comes of it."""

import asyncio
from collections.abc import Callable

from memserve.cluster.cluster import Cluster


def kill(cluster: Cluster, number: int) -> None:
    process = cluster._members.by_number[number].process
    assert process is not None
    process.kill()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def all_serve(cluster: Cluster, number: int) -> None:
    await until(lambda: len(cluster.scheduler.roles()) == number)
