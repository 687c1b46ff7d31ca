"""The input of one model step: slices of sequences, packed one behind the other.

Values only. A sequence's slice is a chunk of its prompt or its newest token; the scheduler makes no
difference between them, and nothing here does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

LayerWritten = Callable[[int], None]
"""Told, during a step, for how many layers (from the first on) all of its K and V are in the arena."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """T tokens of S sequences, all tensors contiguous on one device.

    Position p of sequence s has its KV in block `block_table[s, p // block_size]`, row
    `p % block_size`. All KV before a slice must be in the arena already; the step writes its own.
    """

    token_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T], each token's index in its sequence"""
    query_start: torch.Tensor
    """int32 [S + 1]: the tokens of sequence s are query_start[s] to query_start[s + 1]"""
    kv_len: torch.Tensor
    """int32 [S]: tokens that the sequence's last token of this step may see, itself included"""
    block_table: torch.Tensor
    """int32 [S, max_blocks]; entries beyond a sequence's length are never read"""
    output_rows: torch.Tensor
    """int64 [N]: the tokens, counted in the step, whose logits are wanted"""
    offsets: torch.Tensor | None = None
    """int64 [S, max_blocks]: elements from the arena's first to each block's, for blocks that lie in
    other arenas too; these are only read, and only kernels can. None: all lie in the arena that the
    step is run on, at their numbers."""
    table_start: torch.Tensor | None = None
    """int64 [S], only in a captured graph: `offsets` is flat then, one sequence's behind the other's,
    and this is where each one's begin. Of `block_table` only the shape counts."""

    def to(self, device: torch.device) -> "StepInput":
        """The step on that device; the copies are ordered before what is launched there later."""
        if device == self.token_ids.device:
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return StepInput(
            token_ids=moved(self.token_ids),
            positions=moved(self.positions),
            query_start=moved(self.query_start),
            kv_len=moved(self.kv_len),
            block_table=moved(self.block_table),
            output_rows=moved(self.output_rows),
            offsets=None if self.offsets is None else moved(self.offsets),
            table_start=None if self.table_start is None else moved(self.table_start),
        )


def one_sequence(
    token_ids: torch.Tensor, block_table: torch.Tensor, *, start: int = 0, num_outputs: int
) -> StepInput:
    """Tokens int64 [T] of one sequence from position `start` on, on the CPU.

    With logits of the last `num_outputs` of them, or of all; block_table int32 [1, max_blocks].
    """
    count = len(token_ids)
    return StepInput(
        token_ids=token_ids,
        positions=torch.arange(start, start + count),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        kv_len=torch.tensor([start + count], dtype=torch.int32),
        block_table=block_table,
        output_rows=torch.arange(max(0, count - num_outputs), count),
    )
