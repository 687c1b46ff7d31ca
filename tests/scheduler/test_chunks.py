"""How long chunks may be beside running answers: these keep their objective, prompts go on."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.scheduler.chunks import LEAST_TOKENS, SHARE, chunk_tokens
from memserve.scheduler.interface import Ask, Placement
from memserve.scheduler.scheduler import Scheduler
from tests.scheduler.test_policies import CPU, MIXED, prompt, scheduler

MOST = 512
OBJECTIVE = 0.05
ALONE, TOKEN = 0.013, 2e-4


def chunk(decoding: float, prefilling: float, *, alone: float = ALONE) -> float:
    one = np.ones(1)
    found = chunk_tokens(
        MOST, OBJECTIVE, alone * one, decoding * one, TOKEN * one, prefilling * one
    )
    return float(found[0])


def test_prompts_that_come_without_end_leave_each_step_within_the_objective() -> None:
    assert chunk(0.02, 1.0) == 96  # (.045 - .02) / 2e-4 = 125: whole tiles


def test_few_prompts_may_take_long_steps() -> None:
    assert chunk(0.02, 0.1) == MOST


def test_without_running_answers_or_hope_for_them_steps_are_full() -> None:
    assert chunk(0.0, 1.0) == MOST
    assert chunk(0.02, 1.0, alone=OBJECTIVE) == MOST


def test_a_batch_that_is_too_large_still_lets_prompts_go_on() -> None:
    assert chunk(0.2, 0.1) == LEAST_TOKENS


@settings(deadline=None)
@given(st.floats(ALONE, 0.2), st.floats(0, 1), st.floats(0, 1))
def test_the_more_prompts_the_shorter_their_chunks_and_the_pace_is_kept(
    decoding: float, less: float, more: float
) -> None:
    less, more = sorted((less, more))
    tokens = chunk(decoding, more)
    assert LEAST_TOKENS <= tokens <= chunk(decoding, less) <= MOST
    if tokens > LEAST_TOKENS:
        # What prompts compute in a second takes so much of it beside the batch.
        step = decoding + tokens * TOKEN
        busy = min(1.0, more * step / (tokens * TOKEN))
        assert (1 - busy) / decoding + busy / step >= 1 / (SHARE * OBJECTIVE) - 1e-6


def serving(slo_tpot: float | None, num_streams: int) -> Scheduler:
    """An instance that decodes so many answers, and has four prompts to compute."""
    model = scheduler("cost", MIXED)
    made = Scheduler(dataclasses.replace(model._config, slo_tpot=slo_tpot))
    made.join(0, MIXED, num_blocks=[100_000], block_bytes=368_640, epoch=1)
    made.steps.costs = CPU
    for ticket in range(num_streams + 4):
        asked = Ask(prompt=prompt(ticket, 300), max_tokens=100)
        placement = Placement(prefill=0, decode=0, num_cached_tokens=0)
        made.dispatched(ticket, 0, asked, placement, 0.0)
        if ticket < num_streams:
            made.first_token(ticket, 0.1)
    return made


def test_placements_carry_the_bound() -> None:
    asked = Ask(prompt=prompt(999, 300), max_tokens=100)
    bounds = {
        (slo, num): serving(slo, num).place(asked, 0.2).chunk_tokens
        for slo in (None, 0.03, 0.06, 0.1)
        for num in (1, 8)
    }
    assert bounds[None, 8] is None
    few, some, many = bounds[0.03, 8] or 0, bounds[0.06, 8] or 0, bounds[0.1, 8]
    assert (few, many) == (LEAST_TOKENS, MOST)
    assert few < some < MOST
    assert bounds[0.06, 1] == MOST


def test_prompts_are_predicted_to_take_longer_in_shorter_chunks() -> None:
    asked = Ask(prompt=prompt(999, 300), max_tokens=100)
    ttft = []
    for slo in (None, 10.0, 0.03):
        predicted = serving(slo, 8).place(asked, 0.2).prediction
        assert predicted is not None
        ttft.append(predicted.ttft)
    assert ttft[1] == pytest.approx(ttft[0])
    assert ttft[2] > 1.5 * ttft[0]
