"""Sampling where the logits lie: the whole batch at once, and the host waits once, when it likes.

The same rules and the same random numbers as `memserve.model.sampling`, so the same token for the
same logits; sums and exponentials may round another way, which matters only where a number falls on
a border to the last digit. What grammars take comes from the host, one byte a token. Rows with
penalties, biases or log-probabilities are rare and go to the host, those rows alone.
"""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch

from memserve.model.sampling import (
    Sampled,
    SampleRow,
    is_plain_greedy,
    is_shaped,
    sample,
    uniform,
)


@final
class Drawing:
    """The tokens of one batch while they are drawn on a device, and until the host has them."""

    def __init__(
        self, tokens: torch.Tensor, shaped: torch.Tensor, rows: Mapping[int, SampleRow]
    ) -> None:
        """`tokens` int64 [N] are right but for `rows`, whose logits are `shaped`, in their order."""
        self._tokens = tokens
        self._shaped = shaped
        self._rows = rows
        self._on_host = tokens
        self._copied: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._on_host.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @property
    def all_on_device(self) -> bool:
        """Whether the host draws none of the tokens, so that what comes next need not wait for it."""
        return not self._rows

    def pick(self, indexes: Sequence[int]) -> torch.Tensor:
        """The tokens of these rows, int64 on the device, in the order of what is launched there."""
        return self._tokens[_to_device(indexes, torch.int64, self._tokens.device)]

    def result(self) -> list[Sampled]:
        """Wait for the tokens, and so for all that was launched before them; draw the host's."""
        if self._copied is not None:
            self._copied.synchronize()
        sampled = [Sampled(token) for token in self._on_host.tolist()]
        if self._rows:
            drawn = sample(self._shaped.cpu(), [*self._rows.values()])
            for index, one in zip(self._rows, drawn, strict=True):
                sampled[index] = one
        return sampled


def draw_all(logits: torch.Tensor, rows: Sequence[SampleRow]) -> Drawing:
    """Draw one token per row of `logits`, float32 [len(rows), vocab_size], on their device.

    Launches that and doesn't wait. The logits are left as they are, and not looked at afterwards.
    """
    assert logits.shape[0] == len(rows)
    on_host, drawn = {}, []
    for index, row in enumerate(rows):
        if is_shaped(row) or row.sampling.logprobs is not None:
            on_host[index] = row
        elif not is_plain_greedy(row):
            drawn.append(index)
    taken = _taken_by_grammars(logits, rows)
    tokens = taken.argmax(-1)
    if drawn:
        chosen = _to_device(drawn, torch.int64, logits.device)
        tokens[chosen] = draw(taken[chosen], [rows[index] for index in drawn])
    # A copy, since the next step may be launched, and its logits take this place, before they are read.
    shaped = logits[_to_device([*on_host], torch.int64, logits.device)] if on_host else logits[:0]
    return Drawing(tokens, shaped, on_host)


def draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Tokens int64 [len(rows)], drawn by inverting the cumulative distribution over the kept ones.

    logits float32 [len(rows), vocab_size]. Rows are neither greedy nor shaped.
    """
    vocab_size = logits.shape[1]
    params = [row.sampling for row in rows]
    # float64, as a float32 holds neither a random number nor a large k exactly.
    table = _to_device(
        [
            [p.temperature for p in params],
            [p.min_p for p in params],
            [p.top_p for p in params],
            [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params],
            [uniform(r.sampling.seed, r.choice, r.position) for r in rows],
        ],
        torch.float64,
        logits.device,
    )
    temperature, min_p, top_p, top_k, number = table[:, :, None]
    top = logits.amax(-1, keepdim=True)
    weights = torch.exp((logits - top) / temperature.float())
    largest_k = max((p.top_k for p in params if 0 < p.top_k < vocab_size), default=0)
    if largest_k:
        best = logits.topk(largest_k).values
        lowest = best.gather(1, (top_k.long() - 1).clamp(max=largest_k - 1))
        weights.masked_fill_((logits < lowest) & (top_k < vocab_size), 0.0)
    if any(p.min_p > 0.0 for p in params):
        weights.masked_fill_(weights < min_p.float(), 0.0)
    if any(p.top_p < 1.0 for p in params):
        weights.masked_fill_((weights < _nucleus_border(weights, top_p)) & (top_p < 1.0), 0.0)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    wanted = number * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, wanted, right=True)
    # Rounded up to the whole mass: the last token of any weight.
    last = vocab_size - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(index, last).squeeze(-1)


def _taken_by_grammars(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """The logits, or a copy of them where tokens that a row's grammar does not take have -inf."""
    allowed = {index: row.allowed for index, row in enumerate(rows) if row.allowed is not None}
    if not allowed:
        return logits
    refused = torch.from_numpy(~np.stack([*allowed.values()]))
    if logits.device.type == "cuda":
        refused = refused.pin_memory()
    chosen = _to_device([*allowed], torch.int64, logits.device)
    refused = refused.to(logits.device, non_blocking=True)
    return logits.index_copy(0, chosen, logits[chosen].masked_fill(refused, -torch.inf))


def _nucleus_border(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest weight in the smallest set of likeliest tokens with a share of `top_p`, [N, 1]."""
    ranked = weights.sort(-1, descending=True).values
    up_to = ranked.cumsum(-1, dtype=torch.float64)
    before = up_to - ranked
    count = (before < top_p * up_to[:, -1:]).sum(-1, keepdim=True)
    return ranked.gather(1, (count - 1).clamp(min=0))


def _to_device(values: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor on the device, without waiting for what runs there."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
