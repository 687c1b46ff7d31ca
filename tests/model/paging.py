"""Run a `Model` over sequences by a schedule of slices, as the engine would, and collect logits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from memserve.model.model import Model
from memserve.model.step import StepInput
from memserve.pool.refs import KVCacheDType

TOLERANCE = 1e-4


@dataclass
class Paged:
    """One sequence on its way through an arena."""

    tokens: torch.Tensor  # int64 [length]
    blocks: list[int]
    num_computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


class Arena:
    """Blocks of a model's shape, handed out in no particular order."""

    def __init__(
        self,
        model: Model,
        block_size: int,
        num_blocks: int = 64,
        *,
        kv_cache_dtype: KVCacheDType = "auto",
    ) -> None:
        spec = model.spec
        self.block_size = block_size
        self.tensor = torch.full(
            (num_blocks, spec.num_layers, 2, block_size, spec.num_kv_heads, spec.head_dim),
            torch.nan,
            dtype=getattr(torch, spec.block_layout(block_size, kv_cache_dtype).dtype),
            device=model.device,
        )
        generator = torch.Generator().manual_seed(3)
        self._free: list[int] = torch.randperm(num_blocks, generator=generator).tolist()

    def sequence(self, tokens: torch.Tensor) -> Paged:
        count = -(-len(tokens) // self.block_size)
        return Paged(tokens, [self._free.pop() for _ in range(count)])


def step_of(slices: Sequence[tuple[Paged, int]]) -> StepInput:
    """The step that computes the next `count` tokens of each sequence, all logits wanted."""
    width = max(len(s.blocks) for s, _ in slices)
    table = torch.zeros(len(slices), width, dtype=torch.int32)
    for row, (sequence, _) in enumerate(slices):
        table[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
    counts = torch.tensor([0] + [count for _, count in slices])
    ends = [s.num_computed + count for s, count in slices]
    spans = [(s, s.num_computed, end) for (s, _), end in zip(slices, ends, strict=True)]
    total = int(counts.sum())
    return StepInput(
        token_ids=torch.cat([s.tokens[a:b] for s, a, b in spans]),
        positions=torch.cat([torch.arange(a, b) for _, a, b in spans]),
        query_start=counts.cumsum(0).int(),
        kv_len=torch.tensor(ends, dtype=torch.int32),
        block_table=table,
        output_rows=torch.arange(total),
    )


def run_step(model: Model, arena: Arena, slices: Sequence[tuple[Paged, int]]) -> None:
    """One step; appends each slice's logits to its sequence."""
    logits = model.forward(step_of(slices).to(model.device), arena.tensor).cpu()
    for (sequence, count), part in zip(
        slices, torch.split(logits, [c for _, c in slices]), strict=True
    ):
        sequence.logits.append(part)
        sequence.num_computed += count


def run_chunks(model: Model, arena: Arena, sequence: Paged, chunks: Sequence[int]) -> torch.Tensor:
    """Logits [length, vocab] of a sequence computed alone in these chunks."""
    for count in chunks:
        run_step(model, arena, [(sequence, count)])
    return torch.cat(sequence.logits)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Fail unless the logits agree at every position."""
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    # NaN, from a slot that was never written, must fail too.
    assert error <= TOLERANCE, f"logits differ by {error:.2g}"
