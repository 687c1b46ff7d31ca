"""A loaded model: tokens in, logits out, KV in the arena.

The model code is transformers', with its attention replaced; for plain decoders
`memserve.model.fused` runs the same weights with fewer operators.
"""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from memserve.model.attention.batch import Attention, Batch
from memserve.model.attention.interface import IMPLEMENTATION, register
from memserve.model.linear import Linears
from memserve.model.spec import ModelSpec
from memserve.model.step import LayerWritten, StepInput
from memserve.model.weights import settle

CPU = torch.device("cpu")


class Network(Protocol):
    """What computes a step's logits."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [N, vocab_size] of the step's output rows."""


class Transformer:
    """A transformers model with its attention replaced by ours: the path that serves everything."""

    def __init__(self, module: PreTrainedModel, linears: Linears) -> None:
        register()
        module.set_attn_implementation(IMPLEMENTATION)
        linears.replace(module)
        settle(module, linears.weights)
        self._module = module

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [N, vocab_size] of the step's output rows, in the model's dtype."""
        step = batch.step
        output = self._module(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.output_rows,
            memserve_batch=batch,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


class Model:
    """A language model over paged KV. One step at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        network: Network,
        attention: Attention,
        device: torch.device = CPU,
    ) -> None:
        self.spec = spec
        self.device = device
        self._network = network
        self._attention = attention

    @property
    def attention(self) -> str:
        """Name of the attention implementation, for the log."""
        return self._attention.name

    @property
    def reads_in_place(self) -> bool:
        """Whether it can attend to blocks of other arenas where they lie."""
        return self._attention.reads_in_place

    @torch.inference_mode()
    def forward(
        self, step: StepInput, arena: torch.Tensor, written: LayerWritten | None = None
    ) -> torch.Tensor:
        """Logits float32 [N, vocab_size] of `step.output_rows`; writes the step's K and V.

        `arena` is [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] of the spec's
        dtype, each block contiguous; it and the step lie on the model's device. `written` is told of
        each layer before its attention.
        """
        return self._network.forward(self._attention.begin(step, arena, written)).float()
