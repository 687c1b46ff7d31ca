"""Steps of long chunks for the kernel under test, and attention written out plainly in float32."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from memserve.model.attention.native import Kernels, PrefillOperands, block_offsets, native_step
from memserve.model.step import StepInput

LAYERS = 2
LAYER = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """Sequences of (context before the step, tokens in the step), all KV in the arena."""

    step: StepInput
    arena: torch.Tensor
    query: torch.Tensor  # [T, Hq, D]
    want: torch.Tensor  # float32, like query
    scale: float


def build(
    spans: list[tuple[int, int]],
    *,
    dtype: str = "bfloat16",
    group: int = 3,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    window: int | None = None,
    spread: float = 1.0,
    shared: Sequence[tuple[int, int]] = (),
) -> Case:
    """Random sequences; `spread` scales the queries, and with them how sharp attention is.

    `shared[i]` says of sequence i with which earlier one it shares how many blocks, all of them full
    and before its new tokens; if it names itself, with none.
    """
    generator = torch.Generator().manual_seed(sum(c + 7 * n for c, n in spans))
    lengths = [context + new for context, new in spans]
    width = -(-max(lengths) // block_size)
    table = torch.randperm(len(spans) * width, generator=generator).view(-1, width).int()
    for row, (source, count) in enumerate(shared):
        table[row, :count] = table[source, :count]
    shape = (len(spans) * width, LAYERS, 2, block_size, kv_heads, head_dim)
    arena = torch.full(shape, math.nan, dtype=DTYPES[dtype])
    counts = torch.tensor([0] + [new for _, new in spans])
    step = StepInput(
        token_ids=torch.zeros(int(counts.sum()), dtype=torch.int64),
        positions=torch.cat([torch.arange(c, c + n) for c, n in spans]),
        query_start=counts.cumsum(0).int(),
        kv_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        output_rows=torch.zeros(0, dtype=torch.int64),
    )
    query = torch.randn(int(counts.sum()), kv_heads * group, head_dim, generator=generator)
    query = (query * spread).to(DTYPES[dtype])
    scale = head_dim**-0.5
    wanted = []
    for row, (context, new) in enumerate(spans):
        rows = torch.randn(2, context + new, kv_heads, head_dim, generator=generator)
        rows = rows.to(DTYPES[dtype])
        positions = torch.arange(context + new)
        blocks = table[row, positions // block_size].long()
        if row < len(shared) and shared[row][0] < row:
            known = shared[row][1] * block_size
            rows[:, :known] = arena[blocks, LAYER, :, positions % block_size].movedim(1, 0)[
                :, :known
            ]
        arena[blocks, LAYER, :, positions % block_size] = rows.transpose(0, 1)
        start = int(step.query_start[row])
        part = query[start : start + new].float()
        wanted.append(plain(part, rows[0].float(), rows[1].float(), scale, window))
    return Case(step, arena, query, torch.cat(wanted), scale)


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention of the last queries [T, Hq, D] over [L, Hkv, D], in float32."""
    new, length, kv_heads = query.shape[0], *key.shape[:2]
    grouped = query.view(new, kv_heads, -1, query.shape[2])
    scores = torch.einsum("qhgd,lhd->hgql", grouped, key) * scale
    distance = torch.arange(length - new, length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hgql,lhd->qhgd", weights, value).flatten(1, 2)


def prefill(
    case: Case,
    kernels: Kernels,
    window: int | None = None,
    *,
    only: Sequence[int] | None = None,
    is_tight: bool = False,
) -> torch.Tensor:
    """The kernel under test on all sequences, or on some, whatever their length; the rest is NaN.

    With `is_tight` the scratch memory has room for the longest sequence of one head and no more.
    """
    if kernels.prefill_operands == PrefillOperands.NONE:
        pytest.skip("this CPU has no AVX-512")
    offsets = block_offsets(case.step, case.arena)
    native = native_step(case.step, case.arena, offsets, case.query.shape[1])
    pointer = ctypes.pointer(native)
    sequences = torch.arange(native.num_sequences, dtype=torch.int32)
    if only is not None:
        sequences = torch.tensor(list(only), dtype=torch.int32)
    size = kernels.prefill_scratch(pointer, sequences.data_ptr(), len(sequences))
    if is_tight:
        longest = int(case.step.kv_len[sequences.long()].max())
        size = min(size, -(-longest // 64) * 64 * -(-case.query.shape[2] // 32) * 32 * 2 * 4)
    scratch = torch.full((size,), 255, dtype=torch.uint8)  # NaN, whatever is read without a write
    output = torch.full_like(case.query, math.nan)
    stride = case.query.stride(0)
    kernels.prefill(
        *(pointer, LAYER, case.query.data_ptr(), stride, output.data_ptr(), stride),
        *(case.scale, window or 0, sequences.data_ptr(), len(sequences)),
        *(scratch.data_ptr(), size),
    )
    return output


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Fail if an element is too far off, or NaN.

    In float32 only the order of sums differs. In bfloat16 the inputs are exactly those of `want`,
    but two roundings come in, of at most 1/256 each: of the output, and of each weight. If one
    weight has it all, they add up to |x| / 128; if many share it, the errors of weights on values
    of size 1 partly cancel, and the constant is for what remains.
    """
    absolute, relative = (1e-5, 0.0) if got.dtype == torch.float32 else (4e-3, 1 / 128)
    error = (got.float() - want).abs()
    limit = want.abs() * relative + absolute
    assert bool((error <= limit).all()), f"off by {error.max().item():.2g}"
