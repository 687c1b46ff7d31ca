"""A group's chunks and other prompts take turns on every rank, and nobody waits longer than for one.

The engines are real and run on threads; what each of their steps computes is written down.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from memserve.workers import turns
from memserve.workers.memory import WorkerMemory
from memserve.workers.runner import StepRunner
from memserve.workers.sequence import Slice
from tests.workers.by_hand import HandEngine, engines
from tests.workers.groups import FakeLauncher, Request, running
from tests.workers.rig import OracleRunner
from tests.workers.test_groups import assert_answered, quiet, text

GROUP = 1000
"""The ticket of the group's prompt."""


@dataclass
class Steps:
    """What one engine's steps have computed: by step, the prompt tokens of each ticket."""

    before: Callable[["Steps"], None] = lambda _: None
    """Called before each step, which stands in `done` already."""
    done: list[dict[int, int]] = field(default_factory=list)

    @property
    def num_group_steps(self) -> int:
        return sum(GROUP in step for step in self.done)

    def ordinary(self) -> list[bool]:
        """For each step with prompts, whether they are others than the group's."""
        return [GROUP not in step for step in self.done if step]

    def engine(self, instance: int, **options: object) -> HandEngine:
        def note(slices: Sequence[Slice]) -> None:
            step: dict[int, int] = {}
            for part in slices:
                if part.sequence.prefilling:
                    ticket = part.sequence.ticket
                    step[ticket] = step.get(ticket, 0) + part.num_tokens
            self.done.append(step)
            self.before(self)

        def runner(memory: WorkerMemory) -> StepRunner:
            return OracleRunner(memory.hbm.tensor, 0.0, before_step=note, space=memory.space)

        made = {"num_blocks": 256, "max_num_seqs": 4, **options}
        return HandEngine(instance, make_runner=runner, **made)  # type: ignore[arg-type]


def at_chunk(number: int, act: Callable[[], None]) -> Callable[[Steps], None]:
    """Do something once, in the middle of a group's chunk."""
    waiting = [act]

    def before(steps: Steps) -> None:
        if waiting and GROUP in steps.done[-1] and steps.num_group_steps == number:
            waiting.pop()()

    return before


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_prompt_that_comes_while_a_group_computes_begins_after_the_chunk_under_way(
    rank: int,
) -> None:
    steps = [Steps() for _ in range(3)]
    with running(*(each.engine(i) for i, each in enumerate(steps))) as launcher:
        chat, engine = text(1, 9), launcher.engines[rank]
        steps[rank].before = at_chunk(3, lambda: engine.submit(1, chat, max_tokens=1))
        asked = launcher.submit(GROUP, text(2, 400), (0, 1, 2), chunk_tokens=8)
        launcher.finish(GROUP)
        launcher.until(lambda: engine.finished(1))
        assert engine.answers(chat, 1, max_tokens=1)
        assert_answered(asked)
        (place,) = (i for i, step in enumerate(steps[rank].done) if 1 in step)
        before, behind = steps[rank].done[:place], steps[rank].done[place:]
        assert sum(GROUP in step for step in before) == 3
        assert sum(GROUP in step for step in behind) > 3


def test_a_stream_of_prompts_on_every_rank_leaves_a_group_each_second_step() -> None:
    num_prompts, steps = 60, [Steps(), Steps()]
    with running(*(each.engine(i) for i, each in enumerate(steps))) as launcher:
        prompts = {ticket: text(ticket, 14) for ticket in range(1, 2 * num_prompts + 1)}

        def flood() -> None:
            for ticket, prompt in prompts.items():
                launcher.engines[ticket % 2].submit(ticket, prompt, max_tokens=1)

        steps[0].before = at_chunk(2, flood)
        asked = launcher.submit(GROUP, text(0, 30 * 2 * 8), (0, 1), chunk_tokens=8)
        launcher.finish(GROUP)
        assert_answered(asked)
        for each in steps:
            order = each.ordinary()
            last = len(order) - order[::-1].index(False)
            others = order[:last]
            # Every chunk of the group is computed before a second step of others.
            assert not any(first and second for first, second in pairwise(others))
        # And the others had theirs: about one before each chunk, while there were any.
        assert sum(steps[0].ordinary()[: 2 * 30]) >= 20
        for ticket, prompt in prompts.items():
            engine = launcher.engines[ticket % 2]
            launcher.until(lambda engine=engine, ticket=ticket: engine.finished(ticket))  # type: ignore[misc]
            assert engine.answers(prompt, ticket, max_tokens=1)
        launcher.until(lambda: quiet(launcher))


def test_a_rank_that_computes_another_prompt_stops_no_stream_of_the_others() -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold(steps: Steps) -> None:
        if 2 in steps.done[-1]:
            held.set()
            assert go_on.wait(timeout=20)

    steps = [Steps(), Steps()]
    with running(*(each.engine(i) for i, each in enumerate(steps))) as launcher:
        zero, one = launcher.engines[0], launcher.engines[1]
        one.submit(1, text(1, 6), max_tokens=900)
        launcher.until(lambda: bool(one.tokens(1)))

        def another() -> None:
            steps[0].before = hold
            zero.submit(2, text(2, 9), max_tokens=1)

        steps[0].before = at_chunk(4, another)
        asked = launcher.submit(GROUP, text(3, 300), (0, 1), chunk_tokens=8)
        launcher.until(held.is_set)
        num_chunks, num_tokens = steps[1].num_group_steps, len(one.tokens(1))
        launcher.until(lambda: len(one.tokens(1)) >= num_tokens + 20)
        assert steps[1].num_group_steps == num_chunks
        go_on.set()
        launcher.finish(GROUP)
        assert_answered(asked)
        launcher.until(lambda: zero.finished(2))
        assert zero.answers(text(2, 9), 2, max_tokens=1)
        one.abort(1)


def test_who_waits_for_a_rank_that_is_busy_with_an_older_group_goes_on_with_others() -> None:
    older, steps = GROUP + 1, [Steps(), Steps(), Steps()]
    started, held, go_on = threading.Event(), threading.Event(), threading.Event()

    def hold(each: Steps) -> None:
        # The older group is slow until the other one has started.
        if older in each.done[-1] and started.wait(0.1) and not held.is_set():
            held.set()
            assert go_on.wait(timeout=20)

    steps[0].before = hold
    with running(*(each.engine(i) for i, each in enumerate(steps))) as launcher:
        first = launcher.submit(older, text(1, 400), (0, 1), chunk_tokens=8)
        launcher.until(lambda: bool(first.refs))
        asked = launcher.submit(GROUP, text(2, 100), (0, 2), chunk_tokens=8)
        launcher.until(lambda: bool(asked.refs))
        assert not first.answer
        started.set()
        launcher.until(held.is_set)
        two = launcher.engines[2]
        for ticket in range(1, 11):
            two.submit(ticket, text(ticket, 12), max_tokens=1)
            launcher.until(lambda ticket=ticket: two.finished(ticket))  # type: ignore[misc]
        go_on.set()
        launcher.finish(older, GROUP)
        assert_answered(first)
        assert_answered(asked)


def test_ranks_that_leave_a_chunk_together_enter_the_next_one_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "MEET_S", 5.0)  # no rank takes that long to say that it is ready
    steps = [Steps(), Steps()]
    with running(*(each.engine(i) for i, each in enumerate(steps))) as launcher:
        streams = {0: text(1, 6), 1: text(2, 6)}
        for instance, prompt in streams.items():
            engine = launcher.engines[instance]
            engine.submit(instance + 1, prompt, max_tokens=800)
            launcher.until(lambda engine=engine, t=instance + 1: bool(engine.tokens(t)))  # type: ignore[misc]
        asked = launcher.submit(GROUP, text(3, 400), (0, 1), chunk_tokens=8)
        launcher.finish(GROUP)
        assert_answered(asked)
        for each in steps:
            shared = [GROUP in step for step in each.done]
            last = len(shared) - shared[::-1].index(True)
            assert all(shared[shared.index(True) : last])
        for instance in streams:
            launcher.engines[instance].abort(instance + 1)


@pytest.mark.parametrize("looks_in_between", [True, False])
def test_a_rank_whose_word_was_seen_begins_no_other_prompt(looks_in_between: bool) -> None:
    zero, one = HandEngine(0), HandEngine(1)
    with engines(zero, one):
        launcher = FakeLauncher((zero, one))
        launcher.submit(GROUP, text(1, 60), (0, 1), chunk_tokens=8)
        zero.step()
        one.step()
        launcher.pump()
        one.step()  # it is ready
        zero.engine._receive(wait=False)  # and zero has not said so yet
        one.submit(2, text(2, 9))
        one.engine._receive(wait=False)
        ordinary = one.engine._batcher.schedule
        entered: list[bool] = []

        def schedule(*, prefill: bool) -> list[Slice]:
            slices = ordinary(prefill=prefill)
            if looks_in_between:
                entered.append(bool(zero.engine._turns.schedule(zero.engine._batcher)))
            return slices

        one.engine._batcher.schedule = schedule  # type: ignore[assignment]
        slices = one.engine._turns.schedule(one.engine._batcher)
        if not looks_in_between:
            entered.append(bool(zero.engine._turns.schedule(zero.engine._batcher)))
        assert entered == [looks_in_between]
        assert {part.sequence.ticket for part in slices} == {GROUP if looks_in_between else 2}
        for engine in (zero, one):
            engine.abort(GROUP)
        one.engine._batcher.schedule = ordinary  # type: ignore[method-assign]
        one.finish(2)
        assert one.answers(text(2, 9), 2)


def test_groups_and_prompts_at_random_all_get_their_answers_and_leave_nothing() -> None:
    random_ = random.Random(5)
    with running(*(Steps().engine(i) for i in range(3))) as launcher:
        for first in range(1, 1200, 100):
            answer_some(launcher, range(first, first + 24), random_)
        launcher.until(lambda: quiet(launcher))


def answer_some(launcher: FakeLauncher, tickets: range, random_: random.Random) -> None:
    """Prompts of groups, some of which are aborted, and of single engines, all at once."""
    shared: list[Request] = []
    alone: list[tuple[int, HandEngine, list[int]]] = []
    for ticket in tickets:
        prompt = text(ticket, random_.randint(1, 60))
        if ticket % 6:
            engine = launcher.engines[random_.randrange(3)]
            engine.submit(ticket, prompt, max_tokens=2)
            alone.append((ticket, engine, prompt))
            continue
        ranks = random_.sample(range(3), random_.choice([2, 3]))
        asked = launcher.submit(ticket, prompt * 2, ranks, chunk_tokens=8)
        if random_.random() < 0.3:
            launcher.until(lambda asked=asked: bool(asked.refs))  # type: ignore[misc]
            launcher.abort(ticket)
        else:
            shared.append(asked)
    launcher.until(lambda: all(asked.finished for asked in shared))
    launcher.until(lambda: all(engine.finished(ticket) for ticket, engine, _ in alone))
    assert all(engine.answers(prompt, ticket, max_tokens=2) for ticket, engine, prompt in alone)
    for asked in shared:
        assert_answered(asked)
