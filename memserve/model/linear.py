"""Linear layers with weights repacked once for the CPU's matrix kernels.

Plain `F.linear` repacks a bfloat16 weight at every call, which for few rows costs more than the
product. `Linears` takes layers' weights, packs them for the fastest kernel that the machine has and
returns what computes with them. The packed copy replaces the weight; nothing else can use it.
float32 is the precision for comparisons and stays with plain `F.linear`, which sums in the order
that transformers' own does.
"""

import enum
import logging
from collections.abc import Sequence
from typing import Protocol, assert_never

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import nn

from memserve.model.attention.native import Kernels
from memserve.model.layer_ops import LayerOps
from memserve.model.weights import OwnWeights, Weights

log = logging.getLogger(__name__)

PACKED_FOR_ROWS = 32
"""The layout oneDNN chooses for this many rows is as good as any for 1 to 1,024 rows."""
TILE_OUTPUTS = 16
TILE_INPUTS = 32
"""Of a weight's tile in memserve/native/matmul.cpp."""


class Linear(Protocol):
    """What maps rows to rows."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], of the weights' dtype."""


class Kind(enum.Enum):
    """What computes bfloat16 layers; the values are for the log."""

    TILES = "own kernel on AMX tiles"
    ONEDNN = "oneDNN with packed weights"
    PLAIN = "torch with weights as they are"


class Linears:
    """Makes the linear layers of one model; chosen once, when it loads."""

    def __init__(self, kernels: Kernels | None, kind: Kind, weights: Weights | None = None) -> None:
        """`kernels` may be None for any kind but `TILES`; `weights` for the layers' own."""
        self._kernels = kernels
        self._kind = kind
        self.weights = weights or OwnWeights()
        """Where the rest of the model's tensors come from, too."""

    def stack(self, layers: Sequence[nn.Linear]) -> Linear:
        """One layer whose outputs are these layers' side by side; takes their weights away."""
        weights = [_take(layer) for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = _stacked_bias(layers)
        if bias is not None:
            bias = self.weights.final(bias)
        if weight.dtype != torch.bfloat16:
            return PlainLinear(self.weights.final(weight), bias)
        match self._kind:
            case Kind.TILES:
                assert self._kernels is not None
                return TiledLinear(self._kernels, [weight], bias, self.weights)
            case Kind.ONEDNN:
                return OneDnnLinear(weight, bias)
            case Kind.PLAIN:
                return PlainLinear(self.weights.final(weight), bias)
            case _:
                assert_never(self._kind)

    def gate(self, gate: nn.Linear, up: nn.Linear, ops: LayerOps) -> Linear:
        """SiLU(gate(x)) * up(x) of two layers of one size; takes their weights away."""
        is_plain = gate.bias is None and gate.weight.dtype == torch.bfloat16
        if self._kind is Kind.TILES and is_plain:
            assert self._kernels is not None
            return TiledLinear(self._kernels, [_take(gate), _take(up)], None, self.weights)
        return StackedGate(ops, self.stack([gate, up]))

    def replace(self, module: nn.Module) -> None:
        """Give every bfloat16 linear layer in the module a packed weight in place of its own."""
        if self._kind is Kind.PLAIN:
            return
        for layer in module.modules():
            if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16:
                layer.forward = self.stack([layer])  # type: ignore[assignment,method-assign]


def choose_kind(kernels: Kernels | None, dtype: torch.dtype) -> Kind:
    """What computes linear layers of `dtype` fastest on this machine."""
    if dtype != torch.bfloat16:
        return Kind.PLAIN
    if kernels is not None and kernels.has_matmul:
        return Kind.TILES
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return Kind.ONEDNN
    return Kind.PLAIN


def choose_linears(
    kernels: Kernels | None, dtype: torch.dtype, weights: Weights | None = None
) -> Linears:
    """The fastest linear layers that this machine has for a model of `dtype`."""
    kind = choose_kind(kernels, dtype)
    log.info("linear layers in %s: %s", str(dtype).removeprefix("torch."), kind.value)
    return Linears(kernels, kind, weights)


class PlainLinear:
    """torch's own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight [out, in], bias [out]."""
        self._weight = weight
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return F.linear(rows, self._weight, self._bias)


class OneDnnLinear:
    """oneDNN's, with the weight in oneDNN's layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight bfloat16 [out, in], bias [out]."""
        self._num_outputs = weight.shape[0]
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
            weight.contiguous(), PACKED_FOR_ROWS
        )
        self._multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if rows.numel() == 0:
            return rows.new_empty(*rows.shape[:-1], self._num_outputs)
        result: torch.Tensor = self._multiply(rows, self._weight, self._bias, "none", [], "")
        return result


class TiledLinear:
    """Our kernel's, with the weight in tiles: x W^T + b, or SiLU(x W1^T) * x W2^T in one pass."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        weights: Weights,
    ) -> None:
        """One layer, or two, gate and up, that have no bias: bfloat16 [out, in], bias [out]."""
        assert len(layers) == 1 or bias is None
        self._multiply = kernels.multiply
        self._num_outputs, self._num_inputs = layers[0].shape
        self._is_gated = len(layers) - 1
        self._bias = bias
        self._packed = weights.final(_pack(kernels, layers))
        self._bias_pointer = None if bias is None else bias.data_ptr()
        self._weight_pointer = self._packed.data_ptr()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        assert rows.dtype == torch.bfloat16
        assert rows.shape[-1] == self._num_inputs
        rows = rows.contiguous()
        target = rows.new_empty(*rows.shape[:-1], self._num_outputs)
        self._multiply(
            rows.data_ptr(),
            self._weight_pointer,
            self._bias_pointer,
            target.data_ptr(),
            rows.numel() // self._num_inputs,
            self._num_inputs,
            self._num_outputs,
            self._is_gated,
        )
        return target


class StackedGate:
    """SiLU(gate(x)) * up(x) of a layer that computes gate and up side by side."""

    def __init__(self, ops: LayerOps, gate_up: Linear) -> None:
        self._ops = ops
        self._gate_up = gate_up

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""
        return self._ops.silu_times(self._gate_up(rows))


def _pack(kernels: Kernels, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights of one size in the kernel's layout, their tiles of outputs in turn.

    Of weights without values the shape of that, without values.
    """
    num_outputs, num_inputs = weights[0].shape
    num_tiles = -(-num_outputs // TILE_OUTPUTS) * len(weights)
    outputs = (num_tiles + num_tiles % 2) * TILE_OUTPUTS
    inputs = -(-num_inputs // TILE_INPUTS) * TILE_INPUTS
    packed = torch.zeros(outputs * inputs, dtype=torch.bfloat16, device=weights[0].device)
    if packed.is_meta:
        return packed
    for index, weight in enumerate(weights):
        rows = weight.contiguous()
        kernels.pack_weight(
            rows.data_ptr(), num_outputs, num_inputs, index, len(weights), packed.data_ptr()
        )
    return packed


def _take(layer: nn.Linear) -> torch.Tensor:
    weight = layer.weight.data
    layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return weight


def _stacked_bias(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    present = [layer.bias.data for layer in layers if layer.bias is not None]
    assert len(present) in (0, len(layers))
    return torch.cat(present) if present else None
