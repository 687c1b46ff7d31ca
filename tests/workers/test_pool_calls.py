"""Calls of the pool through a running cluster: whoever makes them may go away at any moment."""

import asyncio

import pytest

from memserve.pool.refs import BlockRef, Kind
from memserve.scheduler.interface import Role
from tests.workers.rig import RigOptions, answer, generation, rig

OPTIONS = RigOptions(roles=(Role.MIXED, Role.MIXED), num_dram_blocks=32, copy_seconds=0.01)
DOCUMENT = [7, *range(40)]


@pytest.mark.parametrize("num_turns", [0, 1, 2, 5, 20])
@pytest.mark.parametrize("insert", [False, True])
async def test_a_caller_that_goes_away_leaves_nothing_leased(insert: bool, num_turns: int) -> None:
    async with rig(OPTIONS) as cluster:
        await answer(cluster, generation(0, DOCUMENT, 1))
        prefixes = [await cluster.pool.export(number, 100) for number in range(2)]
        (source,) = (number for number, found in enumerate(prefixes) if found)
        refs: list[BlockRef] = prefixes[source][-1].refs
        call = (
            cluster.pool.transfer_with_insert(1 - source, DOCUMENT, refs, kind=Kind.DRAM)
            if insert
            else cluster.pool.transfer(1 - source, refs, kind=Kind.DRAM)
        )
        room = asyncio.create_task(cluster.pool.alloc_mem(4, Kind.MIXED, 1 - source))
        task = asyncio.create_task(call)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        for one in (room, task):
            one.cancel()
        await asyncio.gather(room, task, return_exceptions=True)
        # A lease would last 30 s, and the rig looks now.
        if not room.cancelled():  # its answer was there first
            await cluster.pool.free_mem(room.result())
        if not task.cancelled() and not insert:
            await cluster.pool.free_mem(task.result())
