"""Paged attention on the CPU: writes new KV into the arena and attends over block tables.

`PagedAttention` lives as long as the model and holds what steps share; `begin` returns a
`PagedBatch`, which lives for one step and serves all its layers. Decode and short chunks go to a
C++ kernel that reads each key once for all heads, long chunks in bfloat16 to one made of matrix
products; on matrix tiles so do short ones that share much of their contexts. Long chunks in
float32, or on a CPU without AVX-512, go to gather + SDPA; without a compiler everything does.
"""

import ctypes
import logging
from collections.abc import Sequence

import torch

from memserve.errors import UnsupportedModel
from memserve.model.attention.batch import LayerChecks, LayerFollower, Rotation, rows_contiguous
from memserve.model.attention.gathered import (
    ContextGatherer,
    grouped_attention,
    visibility_mask,
)
from memserve.model.attention.native import (
    Kernels,
    PrefillOperands,
    block_offsets,
    native_step,
)
from memserve.model.step import LayerWritten, StepInput

log = logging.getLogger(__name__)

LONG_CHUNK = 16
"""Query tokens of a sequence from which its slice counts as a long chunk."""

LONG_CHUNK_ROWS = 16
"""The same where matrix tiles serve long chunks: query tokens times query heads per KV head."""

MAX_HEAD_DIM = 256
"""Of the kernel for long chunks."""


class PagedAttention:
    """Attention of one model; not for concurrent use."""

    def __init__(
        self, kernels: Kernels | None, *, num_query_heads: int, windows: Sequence[int | None]
    ) -> None:
        """`windows`: for each layer how many tokens a query sees, itself included, or None."""
        self.kernels = kernels
        self.num_query_heads = num_query_heads
        self.windows = windows
        self.gatherer = ContextGatherer()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        if kernels is None:
            log.warning("no compiled attention kernel: grouped SDPA serves every step, slower")
        else:
            log.info("long chunks in bfloat16 are multiplied by %s", self.long_chunks)

    @property
    def name(self) -> str:
        """For the log: which implementation attends."""
        return "cpu-sdpa" if self.kernels is None else "cpu-native"

    @property
    def reads_in_place(self) -> bool:
        """As `Attention.reads_in_place`."""
        return self.kernels is not None

    @property
    def long_chunks(self) -> str:
        """For the log: what multiplies the long chunks of a bfloat16 model."""
        if self.kernels is None:
            return "sdpa"
        match self.kernels.prefill_operands:
            case PrefillOperands.BFLOAT16:
                return "amx"
            case PrefillOperands.FLOAT32:
                return "avx512"
            case PrefillOperands.NONE:
                return "sdpa"

    def scratch(self, size: int) -> torch.Tensor:
        """Kept memory of at least `size` bytes; new memory would cost page faults at each step."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch

    def begin(
        self, step: StepInput, arena: torch.Tensor, written: LayerWritten | None = None
    ) -> "PagedBatch":
        """As `Attention.begin`."""
        return PagedBatch(self, step, arena, written)


class PagedBatch:
    """One step's attention: `write` and then `attend`, once per layer."""

    def __init__(
        self,
        attention: PagedAttention,
        step: StepInput,
        arena: torch.Tensor,
        written: LayerWritten | None,
    ) -> None:
        self.num_query_heads = attention.num_query_heads
        self.windows = attention.windows
        self.step = step
        self.attended_width = attention.num_query_heads * arena.shape[5]
        self._checks = LayerChecks(step, arena, attention.num_query_heads)
        self._arena = arena
        self._follower = LayerFollower(written)
        self._kernels = attention.kernels
        self._gatherer = attention.gatherer
        counts = step.query_start.diff()
        is_long = counts >= long_chunk(self._kernels, arena, self.num_query_heads)
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        if self._kernels is not None:
            self._offsets = block_offsets(step, arena)
            self.native = native_step(step, arena, self._offsets, self.num_query_heads)
            self.native_pointer = ctypes.pointer(self.native)
            if on_matrix_tiles(self._kernels, arena):
                self._kernels.prefill_claim(self.native_pointer, is_long.data_ptr())
        self._short = (~is_long).nonzero().flatten().int()
        self._long = is_long.nonzero().flatten().int()
        self._num_short, self._num_long = self._short.numel(), self._long.numel()
        self._scratch: torch.Tensor | None = None
        if self._num_long and self._kernels is not None and can_prefill(self._kernels, arena):
            wanted = self._kernels.prefill_scratch(
                self.native_pointer, self._long.data_ptr(), self._num_long
            )
            self._scratch = attention.scratch(wanted)
        elif self._num_long:
            self._bounds: list[int] = step.query_start.tolist()
            self._kv_len: list[int] = step.kv_len.tolist()
        if self._kernels is None:
            if step.offsets is not None:
                raise UnsupportedModel("without the compiled kernels only own blocks can be read")
            self._blocks, self._rows = self._slots()

    def check(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """As `Batch.check`."""
        self._checks.check(layer, query, key, value)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """As `Batch.write`."""
        if self._kernels is None:
            self._arena[:, layer, 0].index_put_((self._blocks, self._rows), key)
            self._arena[:, layer, 1].index_put_((self._blocks, self._rows), value)
            self._follower.wrote(layer)
            return
        key, value = rows_contiguous(key), rows_contiguous(value)
        self._kernels.write_kv(
            self.native_pointer,
            layer,
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
        )
        self._follower.wrote(layer)

    def rotate_and_write(self, layer: int, qkv: torch.Tensor, rotation: Rotation) -> None:
        """As `Batch.rotate_and_write`; only with the compiled kernels."""
        assert self._kernels is not None
        query_norm, key_norm = rotation.query_norm, rotation.key_norm
        self._kernels.rotate_and_write(
            self.native_pointer,
            layer,
            qkv.data_ptr(),
            rotation.cosine.data_ptr(),
            rotation.sine.data_ptr(),
            None if query_norm is None else query_norm.data_ptr(),
            None if key_norm is None else key_norm.data_ptr(),
            rotation.epsilon,
        )
        self._follower.wrote(layer)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        """As `Batch.attend`."""
        if self._num_short:
            assert self._kernels is not None
            self._kernels.attend(
                self.native_pointer,
                layer,
                query.data_ptr(),
                query.stride(0),
                output.data_ptr(),
                output.stride(0),
                None,
                scale,
                window or 0,
                self._short.data_ptr(),
                self._num_short,
            )
        if self._scratch is not None:
            assert self._kernels is not None
            self._kernels.prefill(
                self.native_pointer,
                layer,
                query.data_ptr(),
                query.stride(0),
                output.data_ptr(),
                output.stride(0),
                scale,
                window or 0,
                self._long.data_ptr(),
                self._num_long,
                self._scratch.data_ptr(),
                self._scratch.numel(),
            )
        else:
            for sequence in self._long.tolist():
                self._attend_gathered(sequence, layer, query, output, scale=scale, window=window)

    def _attend_gathered(
        self,
        sequence: int,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        begin, end = self._bounds[sequence : sequence + 2]
        count = end - begin
        block_size = self._arena.shape[3]
        kv_len = self._kv_len[sequence]
        # Whole blocks that no query sees any more are not gathered.
        hidden = 0 if window is None else max(0, kv_len - count + 1 - window)
        first_block = hidden // block_size
        key, value = self._gather(sequence, layer, first_block, -(-kv_len // block_size))
        visible = kv_len - first_block * block_size
        is_causal = count == visible and count > 1 and (window is None or window >= count)
        head_dim = self._arena.shape[5]
        output[begin:end] = grouped_attention(
            query[begin:end].view(count, self.num_query_heads, head_dim),
            key[:visible],
            value[:visible],
            None if is_causal else self._mask(sequence, count, visible, window),
            scale=scale,
            is_causal=is_causal,
        ).flatten(1)

    def _gather(
        self, sequence: int, layer: int, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of some of a sequence's blocks, valid until the next call."""
        if self._kernels is None:
            blocks = self.step.block_table[sequence, first:end]
            return self._gatherer.gather(self._arena, layer, blocks)
        buffers = self._gatherer.buffers(self._arena, end - first)
        self._kernels.gather_kv(
            self.native_pointer,
            layer,
            sequence,
            first,
            end - first,
            *(b.data_ptr() for b in buffers),
        )
        key, value = (buffer.flatten(0, 1) for buffer in buffers)
        return key, value

    def _mask(
        self, sequence: int, count: int, visible: int, window: int | None
    ) -> torch.Tensor | None:
        wanted = (sequence, window)
        if wanted not in self._masks:
            self._masks[wanted] = visibility_mask(count, visible, window, self._arena.dtype)
        return self._masks[wanted]

    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and row of each token of the step, int64 [T] each."""
        step = self.step
        block_size = self._arena.shape[3]
        owner = torch.repeat_interleave(step.query_start.diff().long())
        blocks = step.block_table[owner, step.positions // block_size]
        return blocks.long(), step.positions % block_size


def can_prefill(kernels: Kernels, arena: torch.Tensor) -> bool:
    """Whether the kernel for long chunks serves this arena here.

    It could serve float32, too, and faster than SDPA. But float32 is there to be compared with
    transformers, to 1e-4 of a logit, where another rounding of equal quality may exceed that.
    """
    fits = arena.dtype == torch.bfloat16 and arena.shape[5] <= MAX_HEAD_DIM
    return fits and kernels.prefill_operands != PrefillOperands.NONE


def on_matrix_tiles(kernels: Kernels, arena: torch.Tensor) -> bool:
    """Whether the kernel for long chunks multiplies this arena's blocks on matrix tiles."""
    has_tiles = kernels.prefill_operands == PrefillOperands.BFLOAT16
    return has_tiles and can_prefill(kernels, arena)


def long_chunk(kernels: Kernels | None, arena: torch.Tensor, num_query_heads: int) -> int:
    """Query tokens of a sequence from which it isn't for the kernel for short chunks."""
    if kernels is None:
        return 0
    if on_matrix_tiles(kernels, arena):
        group = num_query_heads // arena.shape[4]
        return max(2, -(-LONG_CHUNK_ROWS // group))
    return LONG_CHUNK
