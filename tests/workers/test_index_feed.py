"""What a worker tells of its index, of its steps and of its copies."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from memserve.messages import (
    Calibrate,
    Calibrated,
    Heartbeat,
    IndexEvents,
    ReportIndex,
    ResetPrefixCache,
    Tokens,
)
from memserve.pool.events import Cleared
from memserve.workers import calibration, index_feed
from memserve.workers.samples import MAX_SAMPLES
from tests.pool.replica import Replica, held_by
from tests.workers.by_hand import HandEngine
from tests.workers.rig import BLOCK_SIZE, SHAPE, oracle_answer


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[HandEngine]:
    """Of 16 blocks of HBM unless the test asks for more."""
    engine = HandEngine(0, num_blocks=getattr(request, "param", 16), num_dram_blocks=32)
    yield engine
    engine.memory.close()


def replica_of(worker: HandEngine) -> Replica:
    """A replica fed by all that the worker has sent."""
    replica = Replica(BLOCK_SIZE)
    sent = [message for message in worker.link.sent if isinstance(message, IndexEvents)]
    assert all(after.number == before.number + 1 for before, after in pairwise(sent))
    for message in sent:
        replica.apply_all(message.events)
    return replica


def test_the_launcher_can_follow_an_index_through_runs_swaps_and_evictions(
    worker: HandEngine,
) -> None:
    for number in range(12):
        worker.submit(number + 1, [number] * 21)
        worker.finish(number + 1)
        worker.drain()
    worker.step()
    stats = worker.engine.stats()
    assert stats.num_swapped_out_blocks > 0
    assert stats.num_evictions > 0
    assert replica_of(worker).holds() == held_by(worker.pool) != {}


def test_the_events_of_a_step_come_before_its_tokens(worker: HandEngine) -> None:
    prompt = [3] * (2 * BLOCK_SIZE)
    worker.submit(1, prompt, max_tokens=BLOCK_SIZE + 1)
    worker.finish(1)
    (end,) = (i for i, sent in enumerate(worker.link.sent) if _finishes(sent))
    told = Replica(BLOCK_SIZE)
    for message in worker.link.sent[:end]:
        if isinstance(message, IndexEvents):
            told.apply_all(message.events)
    assert told.holds() == held_by(worker.pool)
    assert len(told.holds()) == 3


def _finishes(message: object) -> bool:
    return isinstance(message, Tokens) and any(event.finish for event in message.events)


def test_what_changes_while_nothing_runs_is_told_too(worker: HandEngine) -> None:
    worker.submit(1, [3] * 9)
    worker.finish(1)
    worker.link.inbox.put(ResetPrefixCache())
    worker.step()
    assert replica_of(worker).holds() == held_by(worker.pool) == {}


def test_a_launcher_that_missed_something_gets_all_of_it_anew(
    worker: HandEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_feed, "MAX_BLOCKS", 2)
    for number in range(3):
        worker.submit(number + 1, [number] * 9)
        worker.finish(number + 1)
    before = max(m.number for m in worker.link.sent if isinstance(m, IndexEvents))
    worker.link.sent.clear()
    worker.link.inbox.put(ReportIndex())
    worker.step()
    first, *others = [m for m in worker.link.sent if isinstance(m, IndexEvents)]
    assert first.number == before + 1
    assert isinstance(first.events[0], Cleared)
    assert others
    assert replica_of(worker).holds() == held_by(worker.pool)
    worker.submit(9, [9] * 9)
    worker.finish(9)
    assert replica_of(worker).holds() == held_by(worker.pool)


def test_a_request_that_must_not_reuse_neither_finds_nor_leaves_anything(
    worker: HandEngine,
) -> None:
    prompt = [*range(9)]
    worker.submit(1, prompt, reuse=False)
    worker.finish(1)
    assert held_by(worker.pool) == {}
    worker.submit(2, prompt)
    worker.finish(2)
    kept = held_by(worker.pool)
    worker.submit(3, prompt, reuse=False)
    worker.finish(3)
    assert [worker.num_cached(ticket) for ticket in (1, 2, 3)] == [0, 0, 0]
    assert worker.tokens(3) == oracle_answer(prompt, 3)
    assert held_by(worker.pool) == kept


@pytest.mark.parametrize("worker", [64], indirect=True)
def test_a_heartbeat_carries_what_the_latest_steps_computed(worker: HandEngine) -> None:
    worker.step()  # sends the first heartbeat
    worker.submit(1, [1] * 20, max_tokens=2)  # 16 tokens a step
    worker.finish(1)
    worker.submit(2, [2] * 9, max_tokens=2 * MAX_SAMPLES)
    worker.finish(2)
    worker.engine._pulse._next = 0.0
    worker.step()
    beat = worker.link.sent[-1]
    assert isinstance(beat, Heartbeat)
    assert len(beat.steps) == MAX_SAMPLES
    assert all(step.seconds > 0 for step in beat.steps)
    assert [step.num_decode_pairs for step in beat.steps[-2:]] == [
        9 + 2 * MAX_SAMPLES - 2,
        9 + 2 * MAX_SAMPLES - 1,
    ]


def test_a_sample_counts_the_pairs_of_a_chunk_with_what_comes_before_it(
    worker: HandEngine,
) -> None:
    worker.step()  # sends the first heartbeat
    worker.submit(1, [1] * 20, max_tokens=2)
    worker.finish(1)
    steps, _ = worker.memory.samples.take()
    assert [tuple(getattr(s, name) for name in s.__struct_fields__[:4]) for s in steps] == [
        (16, 16 * 17 // 2, 0, 0),
        (4, 4 * 16 + 4 * 5 // 2, 0, 0),
        (0, 0, 1, 21),
    ]


def test_calibration_times_prefills_and_decodes_and_leaves_no_trace(
    worker: HandEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "BUDGET_S", 100.0)
    worker.submit(1, [*range(9)])
    worker.finish(1)
    before, num_steps = held_by(worker.pool), worker.engine.stats().num_steps
    worker.link.inbox.put(Calibrate(7))
    worker.step()
    (told,) = (m for m in worker.link.sent if isinstance(m, Calibrated))
    assert told.query == 7
    assert {step.num_prefill_tokens for step in told.steps} == {0, 16}
    assert {step.num_decodes for step in told.steps} == {0, 1, 4, 8}
    assert len({step.num_prefill_pairs for step in told.steps}) == 3  # none, without context, with
    assert [copy.num_bytes for copy in told.copies] == [SHAPE.block_bytes]
    assert worker.engine.audit() == []
    assert (held_by(worker.pool), worker.engine.stats().num_steps) == (before, num_steps)


def test_calibration_stops_when_its_time_is_over_but_not_before_the_needed_cases(
    worker: HandEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "BUDGET_S", 0.0)
    monkeypatch.setattr(calibration, "NUM_NEEDED", 3)
    worker.link.inbox.put(Calibrate(1))
    worker.step()
    (told,) = (m for m in worker.link.sent if isinstance(m, Calibrated))
    assert len(told.steps) == 3


def test_cases_stay_within_what_the_worker_can_run() -> None:
    for max_len in (1, 5, 64, 200, 5000):
        for case in calibration.cases(512, 8, max_len):
            assert case.rows <= 8
            assert 1 <= case.new <= 512
            assert case.context >= 0
            assert case.context + case.new <= max_len
