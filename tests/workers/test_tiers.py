"""Engines with a DRAM tier, over the oracle of `rig`: what left HBM comes back with its bytes."""

import asyncio
import random

import pytest

from memserve.cluster.cluster import Cluster
from memserve.pool.refs import Encoding
from memserve.scheduler.interface import Role
from memserve.scheduler.scheduler import Scheduler
from memserve.stats import EngineStats
from tests.workers.rig import (
    SHAPE,
    Crossing,
    RigOptions,
    answer,
    generation,
    oracle_answer,
    prompts,
    rig,
)

pytestmark = pytest.mark.usefixtures("stepping")

MIXED = (Role.MIXED,)
PREFILL_DECODE = (Role.PREFILL, Role.DECODE)


async def stats_of(cluster: Cluster) -> list[EngineStats]:
    return [report.inspection.stats for report in await cluster.inspect()]


async def cached_tokens(cluster: Cluster, number: int, prompt: list[int]) -> int:
    async with cluster.generate(generation(number, prompt, 1)) as tokens:
        (event,) = [item.event async for item in tokens]
    return event.num_cached_tokens


async def test_history_that_hbm_had_no_room_for_is_found_in_dram() -> None:
    options = RigOptions(roles=MIXED, num_blocks=16, num_dram_blocks=64)
    documents = [[number] * 24 for number in range(8)]  # 6 blocks each, 48 in all
    async with rig(options) as cluster:
        for number, document in enumerate(documents):
            assert await cached_tokens(cluster, number, [*document, 1]) == 0
        for number, document in enumerate(documents):
            assert await cached_tokens(cluster, 10 + number, [*document, 2]) == 24
        (stats,) = await stats_of(cluster)
    assert stats.num_evictions == 0
    assert stats.num_swapped_out_blocks > 32
    assert stats.num_swapped_in_blocks > 32
    assert stats.num_swapped_bytes == SHAPE.block_bytes * (
        stats.num_swapped_out_blocks + stats.num_swapped_in_blocks
    )


async def test_without_a_dram_tier_the_same_history_is_lost() -> None:
    async with rig(RigOptions(roles=MIXED, num_blocks=16)) as cluster:
        for number in range(8):
            await cached_tokens(cluster, number, [number] * 25)
        assert await cached_tokens(cluster, 9, [0] * 25) == 0
        (stats,) = await stats_of(cluster)
    assert stats.dram is None
    assert stats.num_evictions > 0


@pytest.mark.parametrize("encoding", ["plain", "int8"])
@pytest.mark.parametrize("num_dram_blocks", [3, 20, 400])
@pytest.mark.parametrize("roles", [MIXED, PREFILL_DECODE, (Role.MIXED, Role.MIXED)])
async def test_every_answer_is_right_whatever_moves_between_the_tiers(
    roles: tuple[Role, ...], num_dram_blocks: int, encoding: Encoding
) -> None:
    options = RigOptions(
        roles=roles, num_blocks=20, num_dram_blocks=num_dram_blocks, dram_encoding=encoding
    )
    random_ = random.Random(num_dram_blocks)
    documents = prompts(8, longest=40, seed=1)
    asked = [
        [*random_.choice(documents), *prompt][:50] for prompt in prompts(60, longest=12, seed=2)
    ]
    make_scheduler = Crossing if roles == (Role.MIXED, Role.MIXED) else Scheduler
    async with rig(options, make_scheduler) as cluster:
        answers = await asyncio.gather(
            *(answer(cluster, generation(i, prompt, 9)) for i, prompt in enumerate(asked))
        )
        moved = sum(stats.num_swapped_out_blocks for stats in await stats_of(cluster))
    assert answers == [[oracle_answer(prompt, 9)] for prompt in asked]
    assert moved > 0


async def test_a_preempted_sequence_finds_what_it_had_computed_in_dram() -> None:
    asked = prompts(12, longest=12)
    computed = []
    for num_dram_blocks in (0, 400):
        options = RigOptions(roles=MIXED, num_blocks=14, num_dram_blocks=num_dram_blocks)
        async with rig(options) as cluster:
            answers = await asyncio.gather(
                *(answer(cluster, generation(i, prompt, 30)) for i, prompt in enumerate(asked))
            )
            (stats,) = await stats_of(cluster)
        assert answers == [[oracle_answer(prompt, 30)] for prompt in asked]
        assert stats.num_preemptions > 0
        computed.append(stats.num_prefill_tokens)
    without, with_dram = computed
    assert with_dram < without


@pytest.mark.parametrize("roles", [MIXED, PREFILL_DECODE])
async def test_aborts_while_copies_are_held_leave_every_block_home(roles: tuple[Role, ...]) -> None:
    options = RigOptions(
        roles=roles, num_blocks=24, num_dram_blocks=60, step_seconds=0.0005, copy_seconds=0.002
    )
    random_ = random.Random(5)
    documents = prompts(6, longest=60, seed=3)

    async def impatient(number: int) -> None:
        prompt = [*random_.choice(documents), number % 50]
        async with cluster.generate(generation(number, prompt, 5)) as tokens:
            if random_.random() < 0.5:
                await asyncio.sleep(random_.random() * 0.02)
                return
            async for _ in tokens:
                pass

    async with rig(options) as cluster:
        for round_ in range(12):
            await asyncio.gather(*(impatient(100 * round_ + i) for i in range(10)))
        stats = (await stats_of(cluster))[0]
        for number, document in enumerate(documents):
            prompt = [*document, 7]
            assert await answer(cluster, generation(9000 + number, prompt, 4)) == [
                oracle_answer(prompt, 4)
            ]
    assert stats.num_swapped_in_blocks > 0


async def test_a_reset_drops_the_history_of_both_tiers() -> None:
    options = RigOptions(roles=MIXED, num_blocks=16, num_dram_blocks=64)
    async with rig(options) as cluster:
        for number in range(6):
            await cached_tokens(cluster, number, [number] * 24)
        cluster.reset_prefix_cache()
        (stats,) = await stats_of(cluster)
    assert stats.hbm is not None
    assert stats.dram is not None
    assert (stats.hbm.historical, stats.dram.historical) == (0, 0)
