"""CUDA graphs of decode steps: one recorded step for each bucket of batch sizes, replayed at will.

A step of one token for each sequence is launched as a whole, which spares the host hundreds of
launches. Batches are padded to the bucket above with sequences of length 0, which write nothing and
whose logits nobody gets. What differs between two steps lies in buffers at fixed addresses, filled
by one copy. Other steps (prompts' chunks, followed by layer, too large) aren't served here.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memserve.model.model import Model
from memserve.model.step import StepInput

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

WORD = torch.int64


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded computation: `replay` computes `output` anew from the same addresses."""

    replay: Callable[[], None]
    output: torch.Tensor


Recorder = Callable[[Callable[[], torch.Tensor]], Recording]
"""Records what a function launches; the function may run more than once."""


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are recorded, the largest being `max_num_seqs` or the largest bucket."""
    below = [size for size in BUCKETS if size < max_num_seqs]
    return below if below[-1:] == [BUCKETS[-1]] else [*below, max_num_seqs]


class StepBuffers:
    """The tensors of a decode step at fixed addresses on a device."""

    def __init__(self, num_sequences: int, max_blocks: int, device: torch.device) -> None:
        self.num_sequences = num_sequences
        self.max_blocks = max_blocks
        on_gpu = device.type == "cuda"
        half = -(-num_sequences // 2)
        # The table's stride, tokens, positions, lengths (int32), offsets of blocks.
        self._parts = [1, num_sequences, num_sequences, half, num_sequences * max_blocks]
        self._host = torch.zeros(sum(self._parts), dtype=WORD, pin_memory=on_gpu)
        self._device = torch.zeros(sum(self._parts), dtype=WORD, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        stride, tokens, positions, lengths, offsets = torch.split(self._device, self._parts)
        self.step = StepInput(
            token_ids=tokens,
            positions=positions,
            query_start=torch.arange(num_sequences + 1, dtype=torch.int32, device=device),
            kv_len=lengths.view(torch.int32)[:num_sequences],
            block_table=torch.empty(num_sequences, 0, dtype=torch.int32, device=device),
            output_rows=torch.arange(num_sequences, device=device),
            offsets=offsets.view(num_sequences, max_blocks),
            table_stride=stride,
        )

    def fill(self, step: StepInput, block_stride: int) -> None:
        """Take over a decode step from the CPU and pad it; `block_stride` is the arena's."""
        if self._copied is not None:
            self._copied.synchronize()
        count, width = step.block_table.shape
        stride, tokens, positions, lengths, offsets = torch.split(self._host, self._parts)
        stride.fill_(width)
        for buffer, values in (
            (tokens, step.token_ids),
            (positions, step.positions),
            (lengths.view(torch.int32), step.kv_len),
        ):
            buffer[:count] = values
            buffer[count:] = 0
        table = offsets[: count * width].view(count, width)
        if step.offsets is None:
            table.copy_(step.block_table).mul_(block_stride)
        else:
            table.copy_(step.offsets)
        used = sum(self._parts[:-1]) + count * width
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class DecodeGraphs:
    """The recorded decode steps of one model over one arena."""

    def __init__(
        self,
        model: Model,
        arena: torch.Tensor,
        *,
        max_num_seqs: int,
        max_model_len: int,
        record: Recorder,
    ) -> None:
        """Records all buckets, the largest first, so that the others fit into its memory."""
        self._block_stride = arena.stride(0)
        self._max_blocks = -(-max_model_len // arena.shape[3])
        sizes = bucket_sizes(max_num_seqs)
        started = time.monotonic()
        self._logits = torch.empty(sizes[-1], model.spec.vocab_size, device=arena.device)
        self._graphs: dict[int, tuple[StepBuffers, Recording]] = {}
        for size in reversed(sizes):
            buffers = StepBuffers(size, self._max_blocks, arena.device)
            self._graphs[size] = (buffers, record(self._body(model, arena, buffers.step)))
        self._sizes = sizes
        log.info(
            "recorded decode steps of %s sequences in %.1f s",
            ", ".join(map(str, sizes)),
            time.monotonic() - started,
        )

    def _body(
        self, model: Model, arena: torch.Tensor, step: StepInput
    ) -> Callable[[], torch.Tensor]:
        target = self._logits[: step.kv_len.numel()]
        return lambda: target.copy_(model.forward(step, arena))

    def forward(self, step: StepInput) -> torch.Tensor | None:
        """Logits as of `Model.forward`, or None if the step isn't one for a graph.

        The step lies on the CPU. The logits are valid until the next call.
        """
        count, width = step.block_table.shape
        is_decode = step.token_ids.numel() == count == step.output_rows.numel()
        if not is_decode or count > self._sizes[-1] or width > self._max_blocks:
            return None
        size = next(size for size in self._sizes if size >= count)
        buffers, recording = self._graphs[size]
        buffers.fill(step, self._block_stride)
        recording.replay()
        return recording.output[:count]


def cuda_recorder() -> Recorder:
    """Records CUDA graphs that share their memory, as only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Callable[[], torch.Tensor]) -> Recording:
        # What happens at the first launch only, such as compiling kernels, can't be recorded.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy blocks meanwhile; their calls are no part of this.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = compute()
        return Recording(graph.replay, output)

    return record
