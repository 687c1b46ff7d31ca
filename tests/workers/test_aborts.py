"""Requests that are aborted at random moments of every phase leave nothing (scenario A5)."""

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from memserve.cluster.cluster import Cluster
from memserve.cluster.streams import Stream
from memserve.messages import Abort, Expect, Published, SamplingParams, Submit
from memserve.pool.index import pack_tokens
from memserve.scheduler.interface import Role
from memserve.workers.engine import Engine
from tests.census import census, grown
from tests.workers.by_hand import HandEngine, engines
from tests.workers.rig import (
    PLAIN,
    RigOptions,
    ThreadWorker,
    answer,
    assert_all_home,
    generation,
    oracle_answer,
    prompts,
    rig,
)

PHASES = ("queue", "prefill", "loading", "handover", "room kept", "decode", "ended")
DOCUMENTS = prompts(12, longest=90, seed=8)
BOUNDED = {"Samples", "BlockTable", "StepModel"}
"""They keep the newest so many, a place for each block up to the last that was ever used, and a number
for each instance."""


@dataclasses.dataclass(frozen=True)
class House:
    """Two instances that prefill and one that decodes, with a DRAM tier, fetches and files."""

    cluster: Cluster
    workers: list[ThreadWorker]

    async def at_rest(self) -> Counter[str]:
        """What everything holds when nothing is done and no history is kept."""
        await assert_all_home(self.cluster)
        self.cluster.reset_prefix_cache()
        await assert_all_home(self.cluster)
        while self.cluster.returns.num_under_way:
            await asyncio.sleep(0.01)
        return census(self.cluster, *(worker.engine for worker in self.workers))

    def phase(self, stream: Stream) -> str:
        """Where a stream is now, as far as can be seen from outside."""
        if stream.closed:
            return "ended"
        for worker in reversed(self.workers):  # who decodes comes first
            assert worker.engine is not None
            if found := phase_at(worker.engine, stream.ticket):
                return found
        return "on its way"


def phase_at(engine: Engine, ticket: int) -> str | None:
    """What one engine does with a ticket. Another thread's lists are copied, then looked at."""
    batcher = engine._batcher
    arrival = engine._arrivals._arrivals.get(ticket)
    if arrival is not None and arrival.blocks:
        return "room kept"
    if ticket in engine._departures._leaving:
        return "handover"
    if ticket in list(engine._loads._loads):
        return "loading"
    if any(sequence.ticket == ticket for sequence in list(batcher.waiting)):
        return "queue"
    for sequence in list(batcher.running):
        if sequence.ticket == ticket:
            return "prefill" if sequence.num_outputs == 0 else "decode"
    return None


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    options = RigOptions(
        roles=(Role.PREFILL, Role.PREFILL, Role.DECODE),
        num_blocks=48,
        num_dram_blocks=40,
        cache_dir=str(folder),
        handover_timeout=0.05,
        step_seconds=0.0003,
        copy_seconds=0.0005,
        scheduler=dataclasses.replace(
            PLAIN, routing_policy="round-robin", fetch_policy="always", context_caching="3"
        ),
    )
    workers: list[ThreadWorker] = []
    async with rig(options, workers=workers) as cluster:
        yield House(cluster, workers)


async def leave(house: House, number: int, random_: random.Random, phases: Counter[str]) -> None:
    """One request, left when it is seen in a phase chosen at random, or after a random time."""
    prompt = [*random_.choice(DOCUMENTS), *random_.choices(range(50), k=random_.randint(1, 20))]
    wanted = random_.choice((*PHASES, None))
    patience = random_.random() * 0.03
    asked = generation(number, prompt, random_.randint(1, 12), choices=random_.choice((1, 1, 2)))
    async with house.cluster.generate(asked) as tokens:
        streams = house.cluster._requests[asked.request_id].streams
        if wanted is None:
            await asyncio.sleep(patience)
        elif wanted == "ended":
            async for _ in tokens:
                pass
        else:
            while not all(stream.closed for stream in streams):
                if wanted in map(house.phase, streams):
                    break
                await asyncio.sleep(0.0001)  # the workers' threads want the interpreter too
        phases.update(map(house.phase, streams))


async def abort_many(house: House, number: int, phases: Counter[str]) -> None:
    random_ = random.Random(number)
    for first in range(0, number, 25):
        async with asyncio.timeout(60):
            await asyncio.gather(*(leave(house, first + i, random_, phases) for i in range(25)))


@pytest.mark.parametrize(
    "number",
    [
        300,
        pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
@pytest.mark.usefixtures("stepping")
async def test_a5_aborts_at_random_moments_of_every_phase_leave_nothing(
    number: int, tmp_path: Path
) -> None:
    phases: Counter[str] = Counter()
    async with house(tmp_path) as here:
        await abort_many(here, 50, Counter())
        before = await here.at_rest()
        await abort_many(here, number, phases)
        left = await what_is_left(here, before)
        assert not left
        assert here.cluster.problems() == here.cluster.down() == []
        for prompt in (DOCUMENTS[0], [*DOCUMENTS[1], 7]):
            assert await answer(here.cluster, generation(99_999, prompt, 5)) == [
                oracle_answer(prompt, 5)
            ]
    assert phases.keys() >= set(PHASES), phases


async def what_is_left(house: House, before: Counter[str]) -> dict[str, tuple[int, int]]:
    """Containers with more in them than before, when nothing changes any more."""
    for _ in range(100):
        left = grown(before, await house.at_rest())
        left = {name: counts for name, counts in left.items() if name.split(".")[0] not in BOUNDED}
        if not left:
            break
        await asyncio.sleep(0.02)
    return left


PROMPT = [(3 * place) % 50 for place in range(60)]
SAMPLING = SamplingParams(max_tokens=9, seed=0)


def in_queue(_: HandEngine, engine: HandEngine) -> None:
    engine.submit(99, PROMPT[::-1], max_tokens=400)
    engine.step()
    engine.step()
    engine.submit(2, PROMPT)
    engine.step()
    assert engine.engine.stats().num_waiting == 1
    engine.abort(99)  # so that nothing else holds blocks


def at_chunk(number: int) -> Callable[[HandEngine, HandEngine], None]:
    def run(_: HandEngine, engine: HandEngine) -> None:
        engine.submit(2, PROMPT)
        for _number in range(number):
            engine.step()

    return run


def in_load(peer: HandEngine, engine: HandEngine) -> None:
    peer.ask(1, PROMPT)
    engine.hold = True
    engine.submit(2, PROMPT, fetch=peer.refs(PROMPT))
    engine.step()
    assert engine.held


def before_handover(_: HandEngine, engine: HandEngine) -> None:
    engine.link.inbox.put(
        Submit(ticket=2, choice=0, prompt=pack_tokens(PROMPT), sampling=SAMPLING, decode_on=0)
    )
    while not engine.tokens(2):
        engine.step()
    assert engine.engine._departures


def with_room_kept(peer: HandEngine, engine: HandEngine) -> None:
    peer.link.inbox.put(
        Submit(ticket=2, choice=0, prompt=pack_tokens(PROMPT), sampling=SAMPLING, decode_on=1)
    )
    engine.link.inbox.put(Expect(ticket=2, choice=0, prompt=pack_tokens(PROMPT), sampling=SAMPLING))
    peer.step()
    for message in peer.link.sent:
        if isinstance(message, Published):
            engine.link.inbox.put(message)
    engine.step()
    assert engine.engine.stats().num_incoming == 1


def in_decode(_: HandEngine, engine: HandEngine) -> None:
    engine.submit(2, PROMPT, max_tokens=9)
    while len(engine.tokens(2)) < 3:
        engine.step()


def after_the_end(_: HandEngine, engine: HandEngine) -> None:
    engine.submit(2, PROMPT)
    engine.finish(2)


@pytest.mark.parametrize(
    "arrive",
    [
        in_queue,
        *(at_chunk(number) for number in (1, 2, 3)),
        in_load,
        before_handover,
        with_room_kept,
        in_decode,
        after_the_end,
    ],
    ids=[
        "queue",
        "chunk 1",
        "chunk 2",
        "chunk 3",
        "loading",
        "handover",
        "room kept",
        "decode",
        "ended",
    ],
)
def test_a1_blocks_are_given_back_in_the_step_that_hears_of_the_abort(
    arrive: Callable[[HandEngine, HandEngine], None],
) -> None:
    """Those that a copy still writes to hold nobody's content, and are free when it has ended."""
    peer, engine = HandEngine(0), HandEngine(1, num_blocks=30)
    with engines(peer, engine):
        arrive(peer, engine)
        num_tokens = len(engine.tokens(2))
        for each in (peer, engine):
            each.link.inbox.put(Abort(2))
            each.step()
            stats = each.engine.stats()
            assert stats.hbm is not None
            assert stats.hbm.active == 0
            assert (stats.num_running, stats.num_waiting, stats.num_incoming) == (0, 0, 0)
            assert each.engine.audit() == []
        assert len(engine.tokens(2)) == num_tokens
        engine.hold = False
        engine.release()
        engine.step()
        engine.ask(3, PROMPT)
