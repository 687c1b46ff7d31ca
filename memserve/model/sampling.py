"""Choose the next token of each sequence from its logits.

`sample` draws for every row by itself: the same logits, parameters, choice and position give the
same token whatever else is in the batch. Its randomness is one uniform number per token, hashed
from (seed, choice, position); there is no generator and no state.

Order of operations, as in vLLM: log-probabilities of the untouched logits; logit_bias, min_tokens,
penalties; the grammar; temperature; min_p; top_k; top_p. Tokens that tie at a cut stay together, and
the draw runs over what is kept in order of token id, so that no sorting order can change an outcome.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.messages import SamplingParams

Floats: TypeAlias = NDArray[np.float32]

GREEDY_BELOW = 1e-5
"""A temperature this low draws the most likely token."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What decides one token beside its logits."""

    sampling: SamplingParams
    choice: int
    position: int
    """Index of this token in the answer."""
    prompt: Sequence[int]
    output: Sequence[int]
    eos_token_ids: Collection[int] = ()
    """Not drawn before `min_tokens`; the request's own stop ids aren't either."""
    allowed: NDArray[np.bool_] | None = None
    """[vocab_size]: the tokens that its grammar takes next, one at least; None: all."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token; log-probabilities only if asked for, in the untouched distribution."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), the likeliest first."""
    failure: str = ""
    """Why there is no token (a grammar that can't be followed); empty: there is one."""


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Draw one token per row of `logits`, float32 [len(rows), vocab_size] on any device.

    The logits are left as they are.
    """
    assert logits.shape[0] == len(rows)
    if not rows:
        return []
    greedy: list[int] | None = None
    on_host: Floats | None = None
    drawn: list[Sampled] = []
    for index, row in enumerate(rows):
        if row.allowed is None and is_plain_greedy(row):
            if greedy is None:
                greedy = logits.argmax(-1).tolist()
            drawn.append(Sampled(greedy[index]))
            continue
        if on_host is None:
            on_host = logits.detach().cpu().numpy()
        drawn.append(_sample_row(on_host[index], row))
    return drawn


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (SplitMix64's finaliser)."""
    state = _mixed(seed & _MASK)
    state = _mixed(state ^ (choice & _MASK))
    state = _mixed(state ^ (position & _MASK))
    return (state >> 11) * 2.0**-53


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def is_plain_greedy(row: SampleRow) -> bool:
    """Whether the likeliest of the tokens that may come is all that is wanted."""
    return (
        row.sampling.temperature < GREEDY_BELOW
        and row.sampling.logprobs is None
        and not is_shaped(row)
    )


def is_shaped(row: SampleRow) -> bool:
    """Whether anything but a grammar changes the logits before the temperature does."""
    params = row.sampling
    return (
        bool(params.logit_bias)
        or row.position < params.min_tokens
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _sample_row(raw: Floats, row: SampleRow) -> Sampled:
    shaped = _shape(raw, row) if is_shaped(row) or row.allowed is not None else raw
    greedy = row.sampling.temperature < GREEDY_BELOW
    token = int(shaped.argmax()) if greedy else _draw(shaped, row)
    if row.sampling.logprobs is None:
        return Sampled(token)
    return _with_logprobs(raw, token, row.sampling.logprobs)


def _shape(raw: Floats, row: SampleRow) -> Floats:
    """A copy of the logits with bias, min_tokens, penalties and what the grammar takes applied."""
    params = row.sampling
    logits = raw.copy()
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias.keys(), np.int64)
        logits[ids] += np.fromiter(params.logit_bias.values(), np.float32)
    if row.position < params.min_tokens and not _must_end(row):
        logits[[*row.eos_token_ids, *params.stop_token_ids]] = -np.inf
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([_ids(row.prompt), _ids(row.output)]))
        values, penalty = logits[seen], np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        seen, counts = np.unique(_ids(row.output), return_counts=True)
        penalties = params.frequency_penalty * counts + params.presence_penalty
        logits[seen] -= penalties.astype(np.float32)
    if row.allowed is not None:
        logits[~row.allowed] = -np.inf
    return logits


def _must_end(row: SampleRow) -> bool:
    """Whether the grammar takes nothing but tokens that end the answer."""
    if row.allowed is None:
        return False
    others = row.allowed.copy()
    others[[*row.eos_token_ids, *row.sampling.stop_token_ids]] = False
    return not others.any()


def _ids(tokens: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(tokens, np.int64)


def _draw(logits: Floats, row: SampleRow) -> int:
    """Draw by inverting the cumulative distribution over the kept tokens, in order of id."""
    params = row.sampling
    kept: NDArray[np.int64] | None = None
    if 0 < params.top_k < logits.size:
        lowest = np.partition(logits, logits.size - params.top_k)[logits.size - params.top_k]
        kept = np.flatnonzero(logits >= lowest)
        logits = logits[kept]
    # Relative to the likeliest token, so that a tiny temperature can't overflow.
    weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0
    if params.top_p < 1.0:
        weights[weights < _nucleus_border(weights, params.top_p)] = 0.0
    cumulative = np.cumsum(weights, dtype=np.float64)
    wanted = uniform(params.seed, row.choice, row.position) * cumulative[-1]
    index = int(np.searchsorted(cumulative, wanted, side="right"))
    if index == weights.size:  # rounded up to the whole mass
        index = int(np.flatnonzero(weights)[-1])
    return index if kept is None else int(kept[index])


def _nucleus_border(weights: Floats, top_p: float) -> np.float32:
    """The smallest weight in the smallest set of likeliest tokens with a share of `top_p`."""
    total = weights.sum(dtype=np.float64)
    # What is below this is less than 1 - top_p even all together: no need to sort it.
    candidates = weights[weights >= (1.0 - top_p) * total / weights.size]
    candidates[::-1].sort()
    before = np.cumsum(candidates, dtype=np.float64) - candidates
    count = int(np.searchsorted(before, top_p * total, side="left"))
    border: np.float32 = candidates[max(0, count - 1)]
    return border


def _with_logprobs(raw: Floats, token: int, count: int) -> Sampled:
    top_logit = raw.max()
    log_total = float(top_logit) + float(np.log(np.exp(raw - top_logit).sum(dtype=np.float64)))
    if count == 0:
        return Sampled(token, float(raw[token]) - log_total)
    count = min(count, raw.size)
    lowest = np.partition(raw, raw.size - count)[raw.size - count]
    ids = np.flatnonzero(raw >= lowest)
    ids = ids[np.argsort(-raw[ids], kind="stable")][:count]
    top = tuple((int(i), float(raw[i]) - log_total) for i in ids)
    return Sampled(token, float(raw[token]) - log_total, top)
