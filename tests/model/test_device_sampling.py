"""Sampling a batch where its logits lie must draw what sampling row by row draws."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from memserve.messages import SamplingParams
from memserve.model.device_sampling import sample_on_device
from memserve.model.sampling import SampleRow, sample

VOCAB = 300
ROWS = 400


def rows_of(**params: Any) -> list[SampleRow]:
    sampling = SamplingParams(**{"max_tokens": 2 * ROWS, "seed": 5, **params})
    return [SampleRow(sampling, 0, position, (1, 2, 3), (4, 5)) for position in range(ROWS)]


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
