"""What is counted of real prompts, over the oracle of `rig`: reuse by its source, over deaths too."""

import asyncio
from pathlib import Path

import msgspec

from memserve.cluster.cluster import Cluster
from memserve.errors import Overloaded
from memserve.messages import Prefilled
from memserve.scheduler.interface import Role
from tests.workers.by_hand import HandEngine, engines
from tests.workers.death import all_serve, kill, until
from tests.workers.rig import PLAIN, RigOptions, answer, generation, prompts, rig
from tests.workers.test_storing import written

DOCUMENT = [7, *range(40)] * 2  # 20 blocks of 4 tokens, and 2 tokens
GAUGES = {"num_running", "num_waiting", "num_incoming", "num_kept_blocks", "hbm", "dram", "disk"}


def prefilled(engine: HandEngine, ticket: int) -> tuple[int, int, int]:
    """Cached tokens of a ticket from DRAM, from peers and from files."""
    first, *others = engine._events(ticket)
    told = first.prefilled
    assert isinstance(told, Prefilled)
    assert told.seconds >= 0
    assert all(event.prefilled is None for event in others)
    return told.num_host_tokens, told.num_p2p_tokens, told.num_disk_tokens


def test_f5_cached_tokens_are_told_by_where_they_lay(tmp_path: Path) -> None:
    holder = HandEngine(0)
    receiver = HandEngine(1, num_dram_blocks=32, cache_dir=str(tmp_path))
    with engines(holder, receiver):
        assert receiver.ask(1, DOCUMENT[:42]) == 0  # 10 blocks are its own
        assert prefilled(receiver, 1) == (0, 0, 0)
        assert receiver.ask(2, DOCUMENT[:42]) == 40
        assert prefilled(receiver, 2) == (0, 0, 0)  # all of it in its HBM
        swap = receiver.pool.swap_out(5)  # the one with the answer, and 4 more
        assert swap is not None
        receiver.memory.copier.start_swap(swap)
        receiver.drain()
        receiver.step()
        holder.ask(1, DOCUMENT)
        assert receiver.ask(3, DOCUMENT, fetch=holder.refs(DOCUMENT)[10:], first=10) == 80
        assert prefilled(receiver, 3) == (16, 40, 0)
        written(receiver)
        receiver.engine._pool.reset()
        assert receiver.ask(4, DOCUMENT) == 80
        assert prefilled(receiver, 4) == (0, 0, 80)


def test_f5_what_could_not_be_fetched_is_not_counted_as_cached() -> None:
    holder, receiver = HandEngine(0), HandEngine(1)
    with engines(holder, receiver):
        holder.ask(1, DOCUMENT)
        refs = holder.refs(DOCUMENT)
        holder.pool.reset()
        assert receiver.ask(1, DOCUMENT, fetch=refs) == 0
        assert prefilled(receiver, 1) == (0, 0, 0)


def test_f5_what_a_preempted_prompt_had_computed_itself_is_no_reuse() -> None:
    engine = HandEngine(0, num_blocks=20)
    with engines(engine):
        older, younger = [*range(30)], [*range(50, 90)]
        engine.submit(1, older, max_tokens=40)
        engine.step()
        engine.submit(2, younger, max_tokens=4)
        engine.step()
        batcher = engine.engine._batcher
        (victim,) = [sequence for sequence in batcher.running if sequence.ticket == 2]
        assert 0 < victim.num_computed < len(younger)
        batcher._preempt(victim)
        engine.finish(1, 2)
        assert engine.num_cached(2) == 0


async def test_f5_cached_tokens_are_what_the_prefill_worker_reused_not_what_was_transferred() -> (
    None
):
    options = RigOptions(roles=(Role.PREFILL, Role.DECODE), scheduler=PLAIN)

    async def cached(cluster: Cluster, number: int, asked: list[int]) -> int:
        async with cluster.generate(generation(number, asked, 6)) as tokens:
            events = [item.event async for item in tokens]
        return events[0].num_cached_tokens

    async with rig(options) as cluster:
        assert await cached(cluster, 1, DOCUMENT) == 0
        assert await cached(cluster, 2, DOCUMENT) == 80
        assert await cached(cluster, 3, [*DOCUMENT, *range(9)]) == 80  # of 91
        _, decode = [report.inspection.stats for report in await cluster.inspect()]
        # The decode worker had 20 blocks of the last prompt and was sent the others.
        assert decode.num_pulled_blocks >= 22


def counters(cluster: Cluster, number: int) -> dict[str, int]:
    told = msgspec.structs.asdict(cluster._members.by_number[number].stats)
    return {name: count for name, count in told.items() if name not in GAUGES}


async def test_f5_counters_never_fall_when_a_worker_starts_again() -> None:
    async with rig(RigOptions(roles=(Role.MIXED,))) as cluster:
        for life in range(2):
            for number, asked in enumerate(prompts(6, longest=30, seed=life)):
                await answer(cluster, generation(10 * life + number, asked, 8))
            await cluster.inspect()
            before = counters(cluster, 0)
            kill(cluster, 0)
            await until(lambda: cluster.recoveries.num_deaths == life + 1)  # noqa: B023
            await all_serve(cluster, 1)
            after = counters(cluster, 0)
            assert all(after[name] >= before[name] for name in before)
        assert counters(cluster, 0)["num_steps"] > 2 * 6 * 8


async def test_e4_load_counters_return_to_nothing_after_aborts_refusals_and_a_death() -> None:
    options = RigOptions(roles=(Role.MIXED, Role.MIXED), step_seconds=0.001, max_num_queued_reqs=8)
    async with rig(options) as cluster:
        asked = [generation(number, range(20), 30) for number in range(20)]
        running = [asyncio.create_task(answer(cluster, one)) for one in asked]
        await until(lambda: cluster.num_streams > 0)
        running[0].cancel()
        kill(cluster, 0)
        ends = await asyncio.gather(*running, return_exceptions=True)
        assert sum(isinstance(end, Overloaded) for end in ends) >= 20 - 8
        await all_serve(cluster, 2)
        loads = cluster.scheduler._loads
        for name in ("num_queued", "queued_tokens", "num_incoming", "num_decoding", "context"):
            assert not loads.rows[name].any(), name
        assert cluster.scheduler.audit() == []
        assert (cluster.num_requests, cluster.num_streams) == (0, 0)
        assert cluster._admission._num_choices == cluster._admission._num_tokens == 0
