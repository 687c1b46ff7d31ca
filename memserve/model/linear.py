"""Linear layers with weights repacked once for the CPU's matrix kernels.

Plain `F.linear` repacks a bfloat16 weight at every call, which for few rows costs more than the
product. The packed copy replaces the weight; nothing else can use it.
"""

import torch

PACKED_FOR_ROWS = 32
"""The layout oneDNN chooses for this many rows is as good as any for 1 to 1,024 rows."""


def can_pack() -> bool:
    """Whether this torch has oneDNN's packed linear layers."""
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class PackedLinear:
    """y = x W^T + b over a packed weight."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
        """Stack the layers: each weight [out_i, in]; the output is the concatenation."""
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
            joined.contiguous(), PACKED_FOR_ROWS
        )
        present = [bias for bias in biases if bias is not None]
        assert len(present) in (0, len(biases))
        self._bias = torch.cat(present) if present else None
        self._multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out], of the weight's dtype."""
        result: torch.Tensor = self._multiply(rows, self._weight, self._bias, "none", [], "")
        return result
