"""Linear layers with weights repacked once for the CPU's matrix kernels.

Plain `F.linear` repacks a bfloat16 weight at every call, which for few rows costs more than the
product. The packed copy replaces the weight; nothing else can use it. float32 is the precision for
comparisons and stays with plain `F.linear`, which sums in the order that transformers' own does.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

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
        """[rows, in] to [rows, sum of out_i], of the weights' dtype."""
        if not self._is_packed:
            return F.linear(rows, self._weight, self._bias)
        result: torch.Tensor = self._multiply(rows, self._weight, self._bias, "none", [], "")
        return result
