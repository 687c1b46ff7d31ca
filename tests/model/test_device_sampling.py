"""Sampling a batch where its logits lie must draw what sampling row by row draws."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from memserve.messages import SamplingParams
from memserve.model.device_sampling import draw_all
from memserve.model.sampling import Sampled, SampleRow, sample
from tests.model.nothing_waits import NothingWaits

VOCAB = 300
ROWS = 400


def rows_of(**params: Any) -> list[SampleRow]:
    sampling = SamplingParams(**{"max_tokens": 2 * ROWS, "seed": 5, **params})
    return [SampleRow(sampling, 0, position, (1, 2, 3), (4, 5)) for position in range(ROWS)]


def sample_on_device(logits: torch.Tensor, rows: list[SampleRow]) -> list[Sampled]:
    return draw_all(logits, rows).result()


def logits_of() -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.3},
        {"temperature": 1e-4},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.5},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.7},
    ],
    ids=str,
)
def test_every_row_gets_the_token_that_it_would_get_alone(params: dict[str, Any]) -> None:
    logits = logits_of()
    before = logits.clone()
    rows = rows_of(**params)
    assert sample_on_device(logits, rows) == sample(logits, rows)
    assert logits.equal(before)


def test_rows_of_all_kinds_share_a_batch() -> None:
    logits = logits_of()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.3},
        {"logprobs": 2},
        {"repetition_penalty": 1.3},
        {"logit_bias": {7: 100.0}},
        {},
    ]
    rows = [rows_of(**kinds[index % len(kinds)])[index] for index in range(ROWS)]
    got = sample_on_device(logits, rows)
    assert got == sample(logits, rows)
    assert {each.token for each in got[6::8]} == {7}


def test_what_grammars_take_is_drawn_from_as_row_by_row() -> None:
    logits = logits_of()
    before = logits.clone()
    draw = np.random.default_rng(1)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 3, "top_p": 0.8, "min_p": 0.01},
        {"logprobs": 2},
        {"presence_penalty": 1.0},
        {"temperature": 0.0, "min_tokens": 2 * ROWS},
    ]
    rows = []
    for index in range(ROWS):
        row = rows_of(**kinds[index % len(kinds)])[index]
        allowed = draw.random(VOCAB) < draw.choice([0.004, 0.1, 0.9])
        allowed[draw.integers(VOCAB)] = True
        rows.append(row if index % 7 == 0 else dataclasses.replace(row, allowed=allowed))
    got = sample_on_device(logits, rows)
    assert got == sample(logits, rows)
    assert logits.equal(before)
    assert all(
        row.allowed is None or row.allowed[each.token] for each, row in zip(got, rows, strict=True)
    )


def test_tokens_that_tie_at_a_cut_stay_together() -> None:
    logits = torch.zeros(ROWS, VOCAB)
    logits[:, :4] = 5.0
    for params in ({"top_k": 2}, {"top_p": 0.3}):
        assert {s.token for s in sample_on_device(logits, rows_of(**params))} == {0, 1, 2, 3}


def test_nothing_to_sample() -> None:
    assert sample_on_device(torch.empty(0, VOCAB), []) == []


def test_tokens_lie_on_the_device_for_the_next_step_unless_the_host_draws_some() -> None:
    logits = logits_of()
    rows = rows_of(top_k=7)
    drawing = draw_all(logits, rows)
    wanted = [each.token for each in sample(logits, rows)]
    assert drawing.all_on_device
    assert drawing.pick([5, 0, 399]).tolist() == [wanted[5], wanted[0], wanted[399]]
    assert not draw_all(logits, [*rows[:-1], *rows_of(logprobs=0)[-1:]]).all_on_device
    assert not draw_all(logits, [*rows[:-1], *rows_of(presence_penalty=1.0)[-1:]]).all_on_device


def test_drawing_is_launched_without_waiting_for_the_device() -> None:
    logits = logits_of()
    rows = rows_of(top_k=40, top_p=0.9, min_p=0.01)
    with NothingWaits():  # type: ignore[no-untyped-call]
        drawing = draw_all(logits, [*rows[:-1], *rows_of(logprobs=1)[-1:]])
        drawing.pick([1, 2])
    assert drawing.result()[:-1] == sample(logits, rows)[:-1]


def test_what_the_host_draws_it_draws_from_the_logits_of_its_step() -> None:
    """The next step's logits take the same place, maybe before the host has looked."""
    logits = logits_of()
    rows = rows_of(frequency_penalty=0.5)
    wanted = sample(logits, rows)
    drawing = draw_all(logits, rows)
    logits.fill_(0.0)
    assert drawing.result() == wanted
