"""Sampling against plain definitions written once more, and its independence of the batch."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from memserve.messages import SamplingParams
from memserve.model.sampling import Sampled, SampleRow, sample, uniform

VOCAB = 50


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def row(
    position: int = 0,
    *,
    choice: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: Sequence[int] = (),
    **params: Any,
) -> SampleRow:
    sampling = SamplingParams(**{"max_tokens": 100, "seed": 11, **params})
    return SampleRow(sampling, choice, position, prompt, output, eos)


def drawn(logits: torch.Tensor, count: int = 4000, **params: Any) -> Counter[int]:
    """How often each token is drawn over `count` positions."""
    rows = [row(position, **params) for position in range(count)]
    return Counter(s.token for s in sample(logits.expand(count, -1), rows))


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def assert_distributed(counts: Counter[int], probabilities: NDArray[np.float64]) -> None:
    """Only possible tokens occur, and each about as often as it should (6 standard deviations)."""
    total = counts.total()
    for token, share in enumerate(probabilities):
        if share == 0:
            assert counts[token] == 0
        deviation = np.sqrt(total * share * (1 - share))
        assert abs(counts[token] - total * share) <= 6 * deviation + 1


def as_array(logits: torch.Tensor) -> NDArray[np.float64]:
    return logits[0].double().numpy()


def test_greedy_takes_the_likeliest_and_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 9]] = 5.0
    logits[1, 3] = 1.0
    assert [s.token for s in sample(logits, [row(temperature=0.0)] * 2)] == [7, 3]
    shaped = row(temperature=0.0, logit_bias={30: 0.5}, logprobs=0)
    assert sample(logits[:1], [shaped])[0].token == 7


def test_plain_sampling_follows_the_softmax_at_each_temperature() -> None:
    logits = logits_of(1)
    for temperature in (0.5, 1.0, 1.7):
        counts = drawn(logits, temperature=temperature)
        assert_distributed(counts, softmax(as_array(logits) / temperature))


def test_a_tiny_temperature_neither_overflows_nor_leaves_the_likeliest() -> None:
    logits = logits_of(2) * 100
    assert set(drawn(logits, 50, temperature=1e-4)) == {int(logits.argmax())}


@pytest.mark.parametrize("top_k", [1, 3, VOCAB - 1, VOCAB, 1000])
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    logits = logits_of(3)
    values = as_array(logits)
    kept = np.argsort(-values)[:top_k]
    masked = np.full(VOCAB, -np.inf)
    masked[kept] = values[kept]
    assert_distributed(drawn(logits, top_k=top_k), softmax(masked))


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_with_that_share(top_p: float) -> None:
    logits = logits_of(4)
    probabilities = softmax(as_array(logits))
    kept: list[int] = []
    for token in np.argsort(-probabilities):
        kept.append(int(token))
        if probabilities[kept].sum() >= top_p:
            break
    expected = np.zeros(VOCAB)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert_distributed(drawn(logits, top_p=top_p), expected)


def test_min_p_is_relative_to_the_likeliest_after_the_temperature() -> None:
    logits = logits_of(5)
    probabilities = softmax(as_array(logits) / 1.5)
    probabilities[probabilities < 0.2 * probabilities.max()] = 0.0
    expected = probabilities / probabilities.sum()
    assert_distributed(drawn(logits, temperature=1.5, min_p=0.2), expected)


def test_top_p_counts_shares_within_what_top_k_left() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    # Alone, 0.6 needs two tokens; of the top two (4/7, 3/7) as well, but 0.55 needs only one.
    assert set(drawn(logits, top_k=2, top_p=0.55)) == {0}
    assert set(drawn(logits, top_p=0.55)) == {0, 1}


def greedy_token(logits: torch.Tensor, **params: Any) -> int:
    return sample(logits, [row(temperature=0.0, **params)])[0].token


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, -1.1]])
    # In the prompt or in the answer, once or often: the same.
    assert greedy_token(logits, repetition_penalty=1.6, prompt=[0]) == 1
    assert greedy_token(logits, repetition_penalty=1.6, output=[0, 0]) == 1
    assert greedy_token(logits, repetition_penalty=1.4, output=[0, 0]) == 0
    assert greedy_token(logits[:, 2:], repetition_penalty=1.2, prompt=[0]) == 1


def test_presence_counts_once_and_frequency_each_time_and_only_in_the_answer() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0]])
    assert greedy_token(logits, presence_penalty=0.9, output=[0, 0, 0]) == 0
    assert greedy_token(logits, presence_penalty=1.1, output=[0]) == 1
    assert greedy_token(logits, frequency_penalty=0.4, output=[0, 0]) == 0
    assert greedy_token(logits, frequency_penalty=0.4, output=[0, 0, 0]) == 1
    assert greedy_token(logits, frequency_penalty=2.0, presence_penalty=2.0, prompt=[0, 0]) == 0


def test_logit_bias_is_added() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0]])
    assert greedy_token(logits, logit_bias={2: 3.5}) == 2
    assert greedy_token(logits, logit_bias={0: -100.0, 1: -100.0}) == 2


def test_before_min_tokens_nothing_that_stops_is_drawn() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0]])
    limited: dict[str, Any] = {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (1,)}
    tokens = [
        sample(logits, [row(position, eos=(0,), **limited)])[0].token for position in range(5)
    ]
    assert tokens == [2, 2, 2, 0, 0]


def test_a_grammar_that_takes_only_the_end_ends_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0]])
    limited = row(0, eos=(0,), temperature=0.0, min_tokens=3, stop_token_ids=(1,))
    for allowed, token in (([1, 0, 0], 0), ([1, 1, 0], 0), ([0, 1, 0], 1), ([1, 1, 1], 2)):
        held = dataclasses.replace(limited, allowed=np.array(allowed, np.bool_))
        assert sample(logits, [held])[0].token == token


def test_a_bias_does_not_lift_what_a_grammar_does_not_take() -> None:
    allowed = np.array([False, True, True])
    held = dataclasses.replace(row(logit_bias={0: 100.0}, logprobs=1), allowed=allowed)
    (drawn,) = sample(torch.tensor([[9.0, 8.0, -100.0]]), [held])
    assert drawn.token == 1
    assert drawn.top[0][0] == 0


def test_logprobs_are_those_of_the_untouched_distribution() -> None:
    logits = logits_of(6)
    expected = torch.log_softmax(logits[0].double(), -1)
    chosen = sample(logits, [row(logprobs=3, temperature=0.3, top_k=4, logit_bias={5: 9.0})])[0]
    assert chosen.logprob == pytest.approx(float(expected[chosen.token]), abs=1e-5)
    values, ids = expected.topk(3)
    assert [token for token, _ in chosen.top] == ids.tolist()
    assert [logprob for _, logprob in chosen.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert sample(logits, [row(logprobs=0)])[0].top == ()
    assert sample(logits, [row()])[0].logprob is None


def test_top_logprobs_put_the_lowest_id_first_among_equals() -> None:
    logits = torch.zeros(1, 8)
    top = sample(logits, [row(logprobs=4)])[0].top
    assert [token for token, _ in top] == [0, 1, 2, 3]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits = logits_of(8, rows=6, vocab=3000)
    rows = [
        row(4, temperature=0.0),
        row(4),
        row(9, top_p=0.8, logprobs=2),
        row(4, choice=1, top_k=20),
        row(0, seed=5, min_p=0.01, repetition_penalty=1.3, prompt=[1, 2]),
        row(2, temperature=0.0, frequency_penalty=0.5, output=[3, 3]),
    ]
    together = sample(logits, rows)
    alone: list[Sampled] = [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    order = [3, 0, 5, 1, 4, 2]
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert together == alone
    assert shuffled == [together[i] for i in order]


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits = logits_of(9)
    before = logits.clone()
    sample(logits, [row(logit_bias={1: 5.0}, top_k=3, top_p=0.5, min_p=0.1, presence_penalty=1.0)])
    assert torch.equal(logits, before)


def test_the_uniform_numbers_differ_by_each_argument_and_fill_the_interval() -> None:
    values = [uniform(s, c, p) for s in (0, 1, 2**63, -1) for c in range(5) for p in range(500)]
    assert len(set(values)) == len(values)
    assert min(values) >= 0.0
    assert max(values) < 1.0
    histogram = np.histogram(values, bins=10, range=(0, 1))[0]
    assert histogram.min() > 800
    assert histogram.max() < 1200


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []
