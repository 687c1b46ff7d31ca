"""The paper's four designs (Table 4) on one prefill and one decode instance, over `rig`'s oracle.

A dialogue's next prompt is the last one, its answer, and a new message; it comes at once.
"""

import asyncio
import dataclasses

import pytest

from memserve.cluster.cluster import Cluster
from memserve.scheduler.interface import ContextCaching, FetchPolicy, Role
from memserve.stats import EngineStats
from tests.workers.rig import (
    BLOCK_SIZE,
    PLAIN,
    RigOptions,
    generation,
    oracle_answer,
    rig,
)

NUM_TURNS = 10
PREFILL_DECODE = (Role.PREFILL, Role.DECODE)


def options(design: ContextCaching, fetch: FetchPolicy, **changes: object) -> RigOptions:
    scheduler = dataclasses.replace(
        PLAIN, routing_policy="cost", context_caching=design, fetch_policy=fetch
    )
    shape = RigOptions(roles=PREFILL_DECODE, num_blocks=128, scheduler=scheduler)
    return dataclasses.replace(shape, **changes)  # type: ignore[arg-type]


async def stats_of(cluster: Cluster) -> list[EngineStats]:
    return [report.inspection.stats for report in await cluster.inspect()]


async def turn(cluster: Cluster, number: int, prompt: list[int], max_tokens: int) -> list[int]:
    """The answer, which must be the oracle's."""
    async with cluster.generate(generation(number, prompt, max_tokens)) as tokens:
        answer = [item.event.token async for item in tokens]
    assert answer == oracle_answer(prompt, max_tokens)
    return answer


async def dialogue(cluster: Cluster, *, patient: bool = False) -> int:
    """Ten turns, each prompt longer by an answer and a message; the number of new tokens.

    A `patient` client leaves the server the time to bring an answer back.
    """
    prompt: list[int] = []
    num_new = 0
    for number in range(NUM_TURNS):
        message = [number % 7, 1 + number, *range(3 + number % 4)]
        prompt += message
        answer = await turn(cluster, number, prompt, 6 + number % 5)
        # The last token has no KV yet, so it is new to whoever goes on.
        num_new += len(message) + (number > 0)
        prompt += answer
        if patient:
            await settled(cluster)
    return num_new


async def settled(cluster: Cluster) -> None:
    """Wait until no return is under way."""
    async with asyncio.timeout(10):
        while cluster.returns.num_under_way:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("patient", [False, True])
async def test_each_turn_of_a_dialogue_prefills_its_new_message_only(patient: bool) -> None:
    async with rig(options("3", "always", step_seconds=0.001)) as cluster:
        num_new = await dialogue(cluster, patient=patient)
        await settled(cluster)
        prefill, decode = await stats_of(cluster)
    assert prefill.num_decode_tokens == decode.num_prefill_tokens == 0
    assert num_new <= prefill.num_prefill_tokens <= num_new + NUM_TURNS * BLOCK_SIZE
    if patient:
        assert prefill.num_returned_blocks > 0
        assert prefill.num_fetched_blocks == 0
    assert cluster.recoveries.num_failed_returns == 0


async def run_design(design: ContextCaching) -> tuple[EngineStats, EngineStats]:
    async with rig(options(design, "never")) as cluster:
        await dialogue(cluster, patient=True)
        prefill, decode = await stats_of(cluster)
    return prefill, decode


async def test_the_four_designs_differ_in_what_is_computed_and_what_is_copied() -> None:
    off, one, two, three = [await run_design(design) for design in ("off", "1", "2", "3")]
    prefilled = [prefill.num_prefill_tokens for prefill, _ in (off, one, two, three)]
    pulled = [decode.num_pulled_blocks for _, decode in (off, one, two, three)]
    returned = [prefill.num_returned_blocks for prefill, _ in (off, one, two, three)]
    # Prefill reuses prompts (1), and with answers that came back everything but the new (3).
    assert off[0].num_cached_tokens == 0
    assert prefilled[0] > prefilled[1] == prefilled[2] > prefilled[3]
    # Decode pulls whole prompts until it keeps them itself (2): then the increment alone.
    assert pulled[0] == pulled[1] > pulled[2] == pulled[3]
    assert returned[:3] == [0, 0, 0] < [returned[3]]
    assert [stats.hbm is not None and stats.hbm.historical > 0 for stats in off] == [False] * 2
    assert [stats.hbm is not None and stats.hbm.historical > 0 for stats in one] == [True, False]


async def test_an_answer_that_its_client_cut_short_comes_back_too() -> None:
    prompt = [*range(3 * BLOCK_SIZE)]
    async with rig(options("3", "never", step_seconds=0.002)) as cluster:
        async with cluster.generate(generation(0, prompt, 200)) as tokens:
            got = [(await anext(tokens)).event.token for _ in range(4 * BLOCK_SIZE)]
        await settled(cluster)
        prefill, _ = await stats_of(cluster)
        assert prefill.num_returned_blocks >= 3
        again = [*prompt, *got]
        async with cluster.generate(generation(1, again, 1)) as tokens:
            cached = (await anext(tokens)).event.num_cached_tokens
    assert cached >= len(prompt) + 3 * BLOCK_SIZE


async def test_a_return_that_fails_costs_nobody_an_answer() -> None:
    """The prefill instance is full of running work: its pool refuses the return."""
    small = options("3", "never", num_blocks=12, step_seconds=0.001)
    async with rig(small) as cluster:
        prompts = [[number, *range(20)] for number in range(12)]
        await asyncio.gather(
            *(turn(cluster, number, prompt, 16) for number, prompt in enumerate(prompts))
        )
        await settled(cluster)
    assert cluster.returns.num_done + cluster.recoveries.num_failed_returns > 0


async def test_nothing_comes_back_from_a_request_decoded_where_it_was_prefilled() -> None:
    async with rig(options("3", "always", roles=(Role.MIXED,))) as cluster:
        await dialogue(cluster)
        (stats,) = await stats_of(cluster)
    assert stats.num_returned_blocks == stats.num_pulled_blocks == 0
    assert stats.num_prefill_tokens < 12 * NUM_TURNS + NUM_TURNS * BLOCK_SIZE
