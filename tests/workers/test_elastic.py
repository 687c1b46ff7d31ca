"""Instances that leave and join while others serve, over the oracle of `rig`."""

import asyncio

import pytest

from memserve.errors import InvalidRequest, NotFound
from memserve.scheduler.interface import Role
from tests.workers.rig import (
    BLOCK_SIZE,
    RigOptions,
    answer,
    generation,
    oracle_answer,
    prompts,
    rig,
)
from tests.workers.test_tiers import cached_tokens

TWO_MIXED = (Role.MIXED, Role.MIXED)


async def test_an_instance_that_leaves_hands_its_history_to_the_others() -> None:
    async with rig(RigOptions(roles=TWO_MIXED, num_dram_blocks=64)) as cluster:
        asked = [[number] * 24 for number in range(6)]
        for number, prompt in enumerate(asked):
            await cached_tokens(cluster, number, [*prompt, 1])
        reports = {report.name: report.inspection.stats for report in await cluster.inspect()}
        leaving = reports["mixed-0"].hbm
        assert leaving is not None
        assert leaving.historical > 0
        assert await cluster.drain(0) == leaving.historical
        assert [instance.name for instance in cluster.instances] == ["mixed-1"]
        for number, prompt in enumerate(asked):
            assert await cached_tokens(cluster, 10 + number, [*prompt, 2]) == 24
            assert await answer(cluster, generation(20 + number, [*prompt, 3], 4)) == [
                oracle_answer([*prompt, 3], 4)
            ]


@pytest.mark.parametrize("num_dram_blocks", [0, 7])
async def test_history_moves_as_far_as_there_is_room(num_dram_blocks: int) -> None:
    async with rig(RigOptions(roles=TWO_MIXED, num_dram_blocks=num_dram_blocks)) as cluster:
        for number in range(6):
            await cached_tokens(cluster, number, [number] * 25)
        assert await cluster.drain(0) == num_dram_blocks


async def test_running_work_ends_where_it_is_and_new_work_goes_elsewhere() -> None:
    options = RigOptions(roles=TWO_MIXED, num_dram_blocks=64, step_seconds=0.002)
    async with rig(options) as cluster:
        first = [
            asyncio.create_task(answer(cluster, generation(i, prompt, 30)))
            for i, prompt in enumerate(prompts(6, longest=20))
        ]
        while cluster.num_requests < len(first):
            await asyncio.sleep(0)
        assert cluster.num_streams == len(first)
        drained = asyncio.create_task(cluster.drain(0))
        await asyncio.sleep(0)
        later = await asyncio.gather(
            *(
                answer(cluster, generation(100 + i, prompt, 5))
                for i, prompt in enumerate(prompts(6, longest=20, seed=1))
            )
        )
        await drained
        answers = await asyncio.gather(*first)
        assert [instance.number for instance in cluster.instances] == [1]
    assert answers == [[oracle_answer(p, 30)] for p in prompts(6, longest=20)]
    assert later == [[oracle_answer(p, 5)] for p in prompts(6, longest=20, seed=1)]


async def test_a_drain_goes_on_when_its_caller_has_gone() -> None:
    async with rig(RigOptions(roles=TWO_MIXED, num_dram_blocks=16)) as cluster:
        drained = asyncio.create_task(cluster.drain(0))
        await asyncio.sleep(0)
        drained.cancel()
        async with asyncio.timeout(10):
            while len(cluster.instances) > 1:
                await asyncio.sleep(0.005)


async def test_the_last_of_its_kind_can_not_leave() -> None:
    async with rig(RigOptions(roles=(Role.PREFILL, Role.DECODE))) as cluster:
        for number in (0, 1):
            with pytest.raises(InvalidRequest, match="nobody"):
                await cluster.drain(number)
        with pytest.raises(NotFound):
            await cluster.drain(2)
        assert await answer(cluster, generation(0, range(9), 2)) == [oracle_answer(range(9), 2)]


async def test_an_instance_gets_another_role_while_it_works() -> None:
    async with rig(RigOptions(roles=(Role.PREFILL, Role.DECODE))) as cluster:
        running = asyncio.create_task(answer(cluster, generation(0, range(9), 20)))
        await asyncio.sleep(0)
        cluster.set_role(0, "mixed")
        cluster.set_role(1, "prefill")
        assert [instance.name for instance in cluster.instances] == ["mixed-0", "prefill-1"]
        assert await answer(cluster, generation(1, range(7), 5)) == [oracle_answer(range(7), 5)]
        assert await running == [oracle_answer(range(9), 20)]
        for role, match in (("prefill", "nobody"), ("king", "one of")):
            with pytest.raises(InvalidRequest, match=match):
                cluster.set_role(0, role)
        with pytest.raises(NotFound):
            cluster.set_role(2, "mixed")


async def test_an_instance_that_joins_serves_and_the_first_may_leave() -> None:
    async with rig(RigOptions(roles=(Role.PREFILL, Role.DECODE), num_dram_blocks=64)) as cluster:
        prompt = [3] * (5 * BLOCK_SIZE)
        await cached_tokens(cluster, 0, [*prompt, 1])
        with pytest.raises(InvalidRequest):
            await cluster.join("king")
        assert await cluster.join("prefill") == "prefill-2"
        assert await cluster.drain(0) == 5
        assert await cached_tokens(cluster, 1, [*prompt, 2]) == len(prompt)
        assert await answer(cluster, generation(2, prompt, 8)) == [oracle_answer(prompt, 8)]
        decode = cluster.instances[0]
        assert (decode.name, decode.stats.num_declined) == ("decode-1", 0)


async def test_placement_knows_where_history_has_moved() -> None:
    roles = (Role.MIXED, Role.MIXED, Role.MIXED)
    async with rig(RigOptions(roles=roles, num_dram_blocks=64)) as cluster:
        asked = [[number] * 24 for number in range(9)]
        for number, prompt in enumerate(asked):
            await cached_tokens(cluster, number, [*prompt, 1])
        assert await cluster.drain(1) > 0
        for number, prompt in enumerate(asked):
            assert await cached_tokens(cluster, 10 + number, [*prompt, 2]) == 24
