"""Linear layers with weights repacked once for the CPU's matrix kernels.

Plain `F.linear` repacks a bfloat16 weight at every call, which for few rows costs more than the
product. The packed copy replaces the weight; nothing else can use it. float32 is the precision for
comparisons and stays with plain `F.linear`, which sums in the order that transformers' own does.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import nn

PACKED_FOR_ROWS = 32
"""The layout oneDNN chooses for this many rows is as good as any for 1 to 1,024 rows."""


def can_pack() -> bool:
    """Whether this torch has oneDNN's packed linear layers."""
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class StackedLinear:
    """y = x W^T + b of several layers at once: their outputs side by side."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
        """Each weight is [out_i, in] and each bias, if there are any, [out_i]."""
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._num_outputs = self._weight.shape[0]
        present = [bias for bias in biases if bias is not None]
        assert len(present) in (0, len(biases))
        self._bias = torch.cat(present) if present else None
        self._is_packed = self._weight.dtype == torch.bfloat16 and can_pack()
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
                self._weight.contiguous(), PACKED_FOR_ROWS
            )
            self._multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., sum of out_i], of the weights' dtype."""
        if rows.numel() == 0:
            return rows.new_empty(*rows.shape[:-1], self._num_outputs)
        if not self._is_packed:
            return F.linear(rows, self._weight, self._bias)
        result: torch.Tensor = self._multiply(rows, self._weight, self._bias, "none", [], "")
        return result


def take_weights(layers: list[nn.Linear]) -> StackedLinear:
    """Stack the layers' weights and take them away from the layers."""
    stacked = StackedLinear(
        [layer.weight.data for layer in layers],
        [None if layer.bias is None else layer.bias.data for layer in layers],
    )
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    return stacked


def pack_linears(module: nn.Module) -> None:
    """Give every bfloat16 linear layer in the module a packed weight in place of its own."""
    if not can_pack():
        return
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16:
            layer.forward = take_weights([layer])  # type: ignore[assignment,method-assign]
