"""One step on the device: slices of sequences in, sampled tokens out.

Turns the bookkeeping of a step into tensors, runs the model over the arena, and samples. Holds no
state between steps, save what sequences carry of their grammars.
"""

from collections.abc import Sequence as Items
from typing import Protocol

import numpy as np
import torch

from memserve.grammar import GrammarError
from memserve.model.device_sampling import sample_on_device
from memserve.model.graphs import DecodeGraphs, cuda_recorder
from memserve.model.model import Model
from memserve.model.sampling import Sampled, SampleRow, sample
from memserve.model.step import LayerWritten, StepInput
from memserve.pool.space import BlockSpace
from memserve.workers.grammars import Allowed, Grammars
from memserve.workers.sequence import Sequence, Slice


class StepRunner(Protocol):
    """Computes a step, as `Runner` does."""

    def run(
        self,
        slices: Items[Slice],
        written: LayerWritten | None = None,
        *,
        is_followed: bool = True,
    ) -> list[Sampled]:
        """Write the KV of all slices; one result for each that samples, in their order.

        Returns when all of it is in the arena, for other threads and processes to read.
        `written` may be told of the layers as they are written. Unless it `is_followed`, nobody reads
        them before the step's end, and it may be told less, or nothing.
        """
        ...


class Forward(Protocol):
    """A model, as `Model` is one."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def forward(
        self, step: StepInput, arena: torch.Tensor, written: LayerWritten | None = None
    ) -> torch.Tensor:
        """See `Model.forward`."""
        ...


class Runner:
    """Computes steps of one model over one arena."""

    def __init__(
        self,
        model: Forward,
        arena: torch.Tensor,
        *,
        eos_token_ids: tuple[int, ...],
        space: BlockSpace | None = None,
        graphs: DecodeGraphs | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`space` knows the blocks that lie elsewhere than in `arena`; without it there are none.

        `arena` lies on the model's device. `graphs` of them serve the steps that they can. Without
        `grammars` no sequence that has one gets a token.
        """
        self._model = model
        self._arena = arena
        self._eos_token_ids = eos_token_ids
        self._space = space
        self._graphs = graphs
        self._grammars = grammars

    def run(
        self,
        slices: Items[Slice],
        written: LayerWritten | None = None,
        *,
        is_followed: bool = True,
    ) -> list[Sampled]:
        """Write the KV of all slices and sample for those that end at their newest token.

        Returns one `Sampled` per sampling slice, in the order of the slices. `written` is told of
        each layer whose KV is written; on a GPU only if it `is_followed`, since the host must wait
        for each layer then.
        """
        on_gpu = self._model.device.type == "cuda"
        if on_gpu and not is_followed:
            written = None
        logits = self._forward(step_input(slices, self._space), written)
        # On a GPU the step runs meanwhile.
        drawing = [part.sequence for part in slices if part.samples]
        allowed, failures = self._allowed(drawing)
        rows = [
            sample_row(sequence, self._eos_token_ids, allowed.get(row))
            for row, sequence in enumerate(drawing)
        ]
        if on_gpu:
            sampled = sample_on_device(logits, rows)
            # Without a token to sample nothing was waited for, and who hears of the blocks reads them.
            torch.cuda.current_stream(self._model.device).synchronize()
        else:
            sampled = sample(logits, rows)
        for row, failure in failures.items():
            sampled[row] = Sampled(token=-1, failure=failure)
        return sampled

    def _allowed(self, drawing: Items[Sequence]) -> tuple[dict[int, Allowed], dict[int, str]]:
        """By row what grammars take next, and why some can't be followed."""
        allowed: dict[int, Allowed] = {}
        failures: dict[int, str] = {}
        for row, sequence in enumerate(drawing):
            if not sequence.sampling.grammar:
                continue
            if self._grammars is None:
                failures[row] = "this worker can't hold answers to grammars"
                continue
            try:
                if sequence.follower is None:
                    sequence.follower = self._grammars.follower(sequence.sampling.grammar)
                allowed[row] = sequence.follower.allowed(sequence.answer)
            except GrammarError as error:
                failures[row] = str(error)
        return allowed, failures

    def _forward(self, step: StepInput, written: LayerWritten | None) -> torch.Tensor:
        if self._graphs is not None and written is None:
            logits = self._graphs.forward(step)
            if logits is not None:
                return logits
        return self._model.forward(step.to(self._model.device), self._arena, written)


def build_runner(
    model: Model,
    arena: torch.Tensor,
    *,
    eos_token_ids: tuple[int, ...],
    max_num_seqs: int,
    enforce_eager: bool,
    space: BlockSpace | None = None,
    grammars: Grammars | None = None,
) -> Runner:
    """A runner on the model's device, where `arena` lies, too.

    On a GPU it records graphs of decode steps of up to `max_num_seqs` sequences, which takes some
    seconds; not with `enforce_eager`.
    """
    graphs = None
    if model.device.type == "cuda" and not enforce_eager:
        graphs = DecodeGraphs(
            model,
            arena,
            max_num_seqs=max_num_seqs,
            max_model_len=model.spec.max_model_len,
            record=cuda_recorder(),
        )
    return Runner(
        model, arena, eos_token_ids=eos_token_ids, space=space, graphs=graphs, grammars=grammars
    )


def step_input(slices: Items[Slice], space: BlockSpace | None = None) -> StepInput:
    """The tensors of a step; shapes stand in `StepInput`."""
    counts = np.array([part.num_tokens for part in slices], np.int32)
    starts = np.array([part.start for part in slices], np.int32)
    query_start = np.zeros(len(slices) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    token_ids = np.empty(query_start[-1], np.int64)
    width = max(len(part.sequence.blocks) for part in slices)
    block_table = np.zeros((len(slices), width), np.int32)
    for row, part in enumerate(slices):
        sequence = part.sequence
        tokens = np.frombuffer(sequence.tokens, np.int32)
        token_ids[query_start[row] : query_start[row + 1]] = tokens[part.start : part.end]
        block_table[row, : len(sequence.blocks)] = np.frombuffer(sequence.blocks, np.int32)
    first = np.repeat(starts - query_start[:-1], counts)
    positions = first.astype(np.int64) + np.arange(query_start[-1])
    sampling = np.array([part.samples for part in slices], np.bool_)
    offsets = None
    if any(part.sequence.spread for part in slices):
        assert space is not None
        offsets = torch.from_numpy(space.offsets(block_table))
    return StepInput(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        query_start=torch.from_numpy(query_start),
        kv_len=torch.from_numpy(starts + counts),
        block_table=torch.from_numpy(block_table),
        output_rows=torch.from_numpy(query_start[1:][sampling].astype(np.int64) - 1),
        offsets=offsets,
    )


def sample_row(
    sequence: Sequence, eos_token_ids: tuple[int, ...], allowed: Allowed | None = None
) -> SampleRow:
    """What the sampler needs to know to draw the next token of a sequence."""
    return SampleRow(
        sampling=sequence.sampling,
        choice=sequence.choice,
        position=sequence.num_outputs,
        prompt=sequence.tokens[: sequence.num_prompt_tokens],
        output=sequence.answer,
        eos_token_ids=eos_token_ids,
        allowed=allowed,
    )
