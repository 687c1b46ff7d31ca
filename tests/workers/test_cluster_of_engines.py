"""Cluster, engines, pool and copies together, over the oracle of `rig`."""

import asyncio
import queue

import pytest

from memserve.cluster.instance import Instance
from memserve.errors import InvalidRequest, Overloaded, RequestFailed
from memserve.messages import TokenEvent
from memserve.pool.refs import BlockRef
from memserve.scheduler.interface import Role
from memserve.workers.copying import Copier
from memserve.workers.link import CopyFailed, Event
from memserve.workers.samples import Samples
from tests.workers.rig import (
    BLOCK_SIZE,
    Crossing,
    RigOptions,
    answer,
    ask_impatiently,
    generation,
    oracle_answer,
    prompts,
    rig,
)

pytestmark = pytest.mark.usefixtures("stepping")

PREFILL_DECODE = (Role.PREFILL, Role.DECODE)
TWO_MIXED = (Role.MIXED, Role.MIXED)


@pytest.mark.parametrize("roles", [(Role.MIXED,), PREFILL_DECODE, TWO_MIXED])
async def test_every_placement_gives_the_same_answer(roles: tuple[Role, ...]) -> None:
    async with rig(RigOptions(roles=roles)) as cluster:
        asked = prompts(40, longest=40)
        answers = await asyncio.gather(
            *(answer(cluster, generation(i, prompt, 9)) for i, prompt in enumerate(asked))
        )
    assert answers == [[oracle_answer(prompt, 9)] for prompt in asked]


async def test_a_prefilled_request_is_decoded_on_the_decode_instance() -> None:
    async with rig(RigOptions(roles=PREFILL_DECODE)) as cluster:
        await answer(cluster, generation(0, range(21), 5))
        prefill, decode = [report.inspection.stats for report in await cluster.inspect()]
    assert (prefill.num_prefill_tokens, prefill.num_decode_tokens) == (21, 0)
    assert (decode.num_prefill_tokens, decode.num_decode_tokens) == (0, 4)
    assert (decode.num_handovers, decode.num_pulled_blocks) == (1, 6)


async def test_only_blocks_that_the_decode_instance_lacks_are_pulled() -> None:
    async with rig(RigOptions(roles=PREFILL_DECODE)) as cluster:
        first = list(range(20))
        await answer(cluster, generation(0, first, 2))
        await answer(cluster, generation(1, [*first, 1, 2, 3], 2))
        decode = (await cluster.inspect())[1].inspection.stats
    assert decode.num_pulled_blocks == 5 + 1


async def test_a_second_turn_skips_the_prefill_of_the_first() -> None:
    async with rig(RigOptions(roles=PREFILL_DECODE)) as cluster:
        first = list(range(20))
        await answer(cluster, generation(0, first, 2))
        async with cluster.generate(generation(1, [*first, 9, 9], 1)) as tokens:
            events = [item.event async for item in tokens]
        prefill = (await cluster.inspect())[0].inspection.stats
    assert events[0].num_cached_tokens == 20
    assert prefill.num_prefill_tokens == 22


async def test_different_salts_share_nothing() -> None:
    async with rig(RigOptions(roles=(Role.MIXED,))) as cluster:
        for number, salt in enumerate(["a", "b", "a"]):
            asked = generation(number, range(20), 1, salt=salt)
            async with cluster.generate(asked) as tokens:
                cached = [item.event.num_cached_tokens async for item in tokens]
            assert cached == [[0], [0], [16]][number]


async def test_concurrent_requests_with_one_prefix_compute_it_once() -> None:
    async with rig(RigOptions(roles=(Role.MIXED,), num_blocks=256)) as cluster:
        document = [7] * 80
        await asyncio.gather(
            *(answer(cluster, generation(i, [*document, i, i], 3)) for i in range(8))
        )
        stats = (await cluster.inspect())[0].inspection.stats
    assert stats.num_prefill_tokens == 80 + 8 * 2


async def test_choices_of_one_request_compute_its_prompt_once() -> None:
    async with rig(RigOptions(roles=(Role.MIXED,))) as cluster:
        answers = await answer(cluster, generation(0, range(41), 3, choices=4))
        stats = (await cluster.inspect())[0].inspection.stats
    assert answers == [oracle_answer(range(41), 3)] * 4
    assert stats.num_prefill_tokens == 41 + 3


async def test_crossed_handovers_in_tiny_arenas_never_get_stuck() -> None:
    """Two instances hand over to each other; each arena holds one request and a half."""
    num_blocks = (24 + 12) // BLOCK_SIZE * 3 // 2
    options = RigOptions(roles=TWO_MIXED, num_blocks=num_blocks, handover_timeout=0.02)
    async with rig(options, Crossing) as cluster:
        asked = [(prompt * 24)[:24] for prompt in prompts(300, longest=24)]
        async with asyncio.timeout(60):
            answers = await asyncio.gather(
                *(answer(cluster, generation(i, prompt, 12)) for i, prompt in enumerate(asked))
            )
        stats = [report.inspection.stats for report in await cluster.inspect()]
    assert answers == [[oracle_answer(prompt, 12)] for prompt in asked]
    assert sum(each.num_handovers for each in stats) > 0


async def test_preempted_sequences_give_the_same_answer() -> None:
    options = RigOptions(roles=(Role.MIXED,), num_blocks=14)
    async with rig(options) as cluster:
        asked = prompts(12, longest=12)
        answers = await asyncio.gather(
            *(answer(cluster, generation(i, prompt, 30)) for i, prompt in enumerate(asked))
        )
        stats = (await cluster.inspect())[0].inspection.stats
    assert answers == [[oracle_answer(prompt, 30)] for prompt in asked]
    assert stats.num_preemptions > 0


@pytest.mark.parametrize("roles", [(Role.MIXED,), PREFILL_DECODE])
async def test_aborts_at_random_moments_leave_every_block_home(roles: tuple[Role, ...]) -> None:
    options = RigOptions(roles=roles, num_blocks=24, handover_timeout=0.05, step_seconds=0.0005)
    async with rig(options) as cluster:
        await ask_impatiently(cluster, rounds=15, longest=30, patience=(-6, 19))
        assert await answer(cluster, generation(9999, range(30), 8)) == [
            oracle_answer(range(30), 8)
        ]


async def test_a_choice_that_is_aborted_lets_the_others_finish() -> None:
    async with rig(RigOptions(roles=PREFILL_DECODE)) as cluster:
        asked = generation(0, range(9), 12, choices=2)
        counts = [0, 0]
        async with cluster.generate(asked) as tokens:
            async for item in tokens:
                counts[item.choice] += 1
                if item.choice == 0 and item.event.position == 3:
                    cluster.abort_choice(asked, 0)
    assert counts[1] == 12
    assert counts[0] >= 4


async def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    async with rig(RigOptions(roles=PREFILL_DECODE, num_blocks=8)) as cluster:
        with pytest.raises(InvalidRequest, match="holds 32"):
            await answer(cluster, generation(0, range(30), 3))
        assert await answer(cluster, generation(1, range(30), 2)) == [oracle_answer(range(30), 2)]


@pytest.mark.parametrize(
    "options",
    [
        RigOptions(roles=(Role.MIXED,), max_num_queued_reqs=1),
        RigOptions(roles=(Role.MIXED,), max_num_queued_tokens=9),
    ],
    ids=["requests", "tokens"],
)
async def test_a_full_queue_refuses_with_overloaded(options: RigOptions) -> None:
    async with (
        rig(options) as cluster,
        cluster.generate(generation(0, range(5), 3)) as tokens,
    ):
        with pytest.raises(Overloaded) as refusal:
            await answer(cluster, generation(1, range(5), 3))
        assert refusal.value.retry_after == 1.0
        with pytest.raises(InvalidRequest):  # that it could never be served, it hears at once
            await answer(cluster, generation(1, range(5), 1000))
        assert [item.event.position async for item in tokens] == [0, 1, 2]


async def test_a_reset_drops_the_history() -> None:
    async with rig(RigOptions(roles=(Role.MIXED,))) as cluster:
        await answer(cluster, generation(0, range(20), 2))
        cluster.reset_prefix_cache()
        stats = (await cluster.inspect())[0].inspection.stats
        assert stats.hbm is not None
        assert stats.hbm.historical == 0


async def test_a_message_that_can_not_be_handled_leaves_nobody_waiting() -> None:
    def broken(instance: Instance, event: TokenEvent) -> None:
        raise KeyError(event.ticket)

    async with rig(RigOptions(roles=(Role.MIXED,), step_seconds=0.01)) as cluster:
        good = cluster._streams.token
        async with cluster.generate(generation(0, range(5), 200)) as tokens:
            await anext(tokens)
            cluster._streams.token = broken  # type: ignore[method-assign]
            with pytest.raises(RequestFailed, match="3 workers have died"):
                [item async for item in tokens]
        cluster._streams.token = good  # type: ignore[method-assign]
        assert await answer(cluster, generation(1, range(7), 3)) == [oracle_answer(range(7), 3)]


@pytest.mark.parametrize("step", [0, 1])
def test_an_error_on_the_copy_thread_is_reported_and_not_swallowed(step: int) -> None:
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    copier = Copier(BrokenTransfer(), None, inbox, Samples(), patience=1.0)  # type: ignore[arg-type]
    copier.start(1, [0], [BlockRef(1, 1, 0, 0, 0)], [0], step)
    copier.close()
    event = inbox.get(timeout=10)
    assert isinstance(event, CopyFailed)
    assert isinstance(event.error, ZeroDivisionError)


class BrokenTransfer:
    needs_lease = False
    num_layers = 1

    def wait_for_layer(self, *_: object, **__: object) -> bool:
        return self.read() == []

    def read(self, *_: object, **__: object) -> list[bool]:
        raise ZeroDivisionError
