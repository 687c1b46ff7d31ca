"""Steps over scattered blocks with all their keys and values, and attention written out plainly."""

import math
from dataclasses import dataclass

import torch

from memserve.model.step import StepInput

LAYERS = 2
LAYER = 1


@dataclass
class Problem:
    """Sequences of (context before the step, tokens in the step), with all their K and V."""

    step: StepInput
    arena: torch.Tensor
    query: torch.Tensor  # [T, Hq, D]
    keys: list[torch.Tensor]  # per sequence [length, Hkv, D]
    values: list[torch.Tensor]
    spans: list[tuple[int, int]]


def problem(
    spans: list[tuple[int, int]],
    *,
    group: int = 3,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
) -> Problem:
    """`kv_dtype` is the arena's, if it isn't `dtype`; keys and values are numbers that it has."""
    generator = torch.Generator().manual_seed(len(spans) + head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lengths = [context + new for context, new in spans]
    width = -(-max(lengths) // block_size)
    table = torch.randperm(len(spans) * width, generator=generator).view(-1, width).int()
    shape = (len(spans) * width, LAYERS, 2, block_size, kv_heads, head_dim)
    arena = torch.full(shape, math.nan, dtype=kv_dtype or dtype)
    keys = [random(n, kv_heads, head_dim).to(arena.dtype).to(dtype) for n in lengths]
    values = [random(n, kv_heads, head_dim).to(arena.dtype).to(dtype) for n in lengths]
    counts = torch.tensor([0] + [new for _, new in spans])
    step = StepInput(
        token_ids=torch.zeros(int(counts.sum()), dtype=torch.int64),
        positions=torch.cat([torch.arange(context, context + new) for context, new in spans]),
        query_start=counts.cumsum(0).int(),
        kv_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        output_rows=torch.zeros(0, dtype=torch.int64),
    )
    for row, (context, _) in enumerate(spans):
        for position in range(context):
            slot = arena[table[row, position // block_size], LAYER, :, position % block_size]
            slot[0] = keys[row][position]
            slot[1] = values[row][position]
    query = random(int(counts.sum()), kv_heads * group, head_dim)
    return Problem(step, arena, query, keys, values, spans)


def expected(task: Problem, scale: float, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq], in float64, one query at a time."""
    outputs, sums = [], []
    token = 0
    for (context, new), keys, values in zip(task.spans, task.keys, task.values, strict=True):
        group = task.query.shape[1] // keys.shape[1]
        for position in range(context, context + new):
            first = 0 if window is None else max(0, position + 1 - window)
            key = keys[first : position + 1].double().repeat_interleave(group, 1)
            value = values[first : position + 1].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,lhd->hl", task.query[token].double(), key) * scale
            outputs.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), value))
            sums.append(scores.logsumexp(-1))
            token += 1
    return torch.stack(outputs), torch.stack(sums)
