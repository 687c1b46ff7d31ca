"""The fast path for plain decoder models: transformers' weights, run with few and fused operators.

Covers models whose layers are pre-norm RMSNorm, rotary attention (with biases or per-head norms)
and SwiGLU: Llama, Mistral, Qwen2, Qwen3. Which models those are is a list of classes, and the probe
compares the result with the model's own forward; whatever fails stays on transformers' path.

Building takes the weights out of the module, layer by layer, so that no second copy of the model
ever exists; the module can't compute afterwards.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from memserve.model.attention.batch import Batch, Rotation
from memserve.model.layer_ops import LayerOps
from memserve.model.linear import Linear, Linears
from memserve.model.shard import Collective, GatheredLinear, SummedLinear
from memserve.model.weights import Weights, settle

FUSABLE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def can_fuse(module: PreTrainedModel) -> bool:
    """Whether `FusedDecoder` knows this model; subclasses may differ and don't count."""
    return type(module) in FUSABLE and module.config.hidden_act == "silu"


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One decoder layer's weights and constants."""

    input_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    gated: Linear
    down: Linear
    scale: float
    window: int | None


class FusedDecoder:
    """A whole model from token ids to logits."""

    def __init__(
        self,
        module: PreTrainedModel,
        ops: LayerOps,
        linears: Linears,
        windows: list[int | None],
        ranks: Collective | None = None,
    ) -> None:
        """With `ranks` the module is this rank's share of a model, as `load_shard` makes it."""
        self._ops = ops
        final = linears.weights.final
        body = module.get_decoder()
        self._embedding = final(module.get_input_embeddings().weight.data)
        self._rotary = body.rotary_emb
        settle(self._rotary, linears.weights)
        self._norm = final(body.norm.weight.data)
        self._epsilon: float = body.norm.variance_epsilon
        self._head: Linear = linears.stack([module.lm_head])
        self._layers = [
            _take_layer(layer, ops, linears, window)
            for layer, window in zip(body.layers, windows, strict=True)
        ]
        if ranks is not None:
            self._head = GatheredLinear(self._head, ranks, module.config.vocab_size)
            self._layers = [
                replace(
                    layer,
                    output=SummedLinear(layer.output, ranks),
                    down=SummedLinear(layer.down, ranks),
                )
                for layer in self._layers
            ]

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [N, vocab_size] of the step's output rows, in the model's dtype."""
        step = batch.step
        residual = self._embedding[step.token_ids]
        cosine, sine = self._rotation(step.positions)
        delta: torch.Tensor | None = None
        normed = torch.empty_like(residual)
        for index, layer in enumerate(self._layers):
            self._add_norm(residual, delta, layer.input_norm, normed)
            attended = self._attend(index, layer, layer.qkv(normed), batch, cosine, sine)
            self._add_norm(residual, layer.output(attended), layer.post_norm, normed)
            delta = layer.down(layer.gated(normed))
        assert delta is not None
        wanted = residual[step.output_rows]
        last = torch.empty_like(wanted)
        self._add_norm(wanted, delta[step.output_rows], self._norm, last)
        return self._head(last)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine float32 [T, head_dim / 2], by the model's own rotary embedding."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cosine, sine = self._rotary(like, position_ids=positions[None])
        half = cosine.shape[-1] // 2
        return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()

    def _add_norm(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        self._ops.add_norm(residual, delta, weight, target, self._epsilon)

    def _attend(
        self,
        index: int,
        layer: FusedLayer,
        qkv: torch.Tensor,
        batch: Batch,
        cosine: torch.Tensor,
        sine: torch.Tensor,
    ) -> torch.Tensor:
        """Rotate, write K and V, attend: qkv [T, (Hq + 2 Hkv) * D] to [T, Hq * D]."""
        rotation = Rotation(cosine, sine, layer.query_norm, layer.key_norm, self._epsilon)
        batch.rotate_and_write(index, qkv, rotation)
        width = batch.attended_width
        output = qkv.new_empty(qkv.shape[0], width)
        batch.attend(index, qkv[:, :width], output, scale=layer.scale, window=layer.window)
        return output


def _take_layer(
    layer: Any,  # noqa: ANN401
    ops: LayerOps,
    linears: Linears,
    window: int | None,
) -> FusedLayer:
    """Pack a transformers layer's weights and take them away from it."""
    attention, mlp = layer.self_attn, layer.mlp
    final = linears.weights.final
    return FusedLayer(
        input_norm=final(layer.input_layernorm.weight.data),
        qkv=linears.stack([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=_norm_weight(attention, "q_norm", linears.weights),
        key_norm=_norm_weight(attention, "k_norm", linears.weights),
        output=linears.stack([attention.o_proj]),
        post_norm=final(layer.post_attention_layernorm.weight.data),
        gated=linears.gate(mlp.gate_proj, mlp.up_proj, ops),
        down=linears.stack([mlp.down_proj]),
        scale=attention.scaling,
        window=window,
    )


def _norm_weight(attention: nn.Module, name: str, weights: Weights) -> torch.Tensor | None:
    parameters = dict(attention.named_parameters())
    norm = parameters.get(f"{name}.weight")
    return None if norm is None else weights.final(norm.data)
