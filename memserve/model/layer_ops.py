"""The small operators of a decoder layer between its matrix products, as each device has them."""

from typing import Protocol

import torch

from memserve.model.attention.native import Kernels


class LayerOps(Protocol):
    """All tensors contiguous, of the weights' type; arithmetic in float32."""

    def add_norm(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        target: torch.Tensor,
        epsilon: float,
    ) -> None:
        """residual += delta, then target = RMSNorm(residual) * weight; all [T, W] but the weight."""

    def silu_times(self, both: torch.Tensor) -> torch.Tensor:
        """SiLU of the first half of each row times its second: [T, 2 W] to [T, W]."""


class NativeLayerOps:
    """On the CPU, by the compiled kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._add_norm = kernels.add_norm
        self._silu_times = kernels.silu_times

    def add_norm(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        target: torch.Tensor,
        epsilon: float,
    ) -> None:
        """As `LayerOps.add_norm`."""
        self._add_norm(
            residual.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            target.data_ptr(),
            residual.shape[0],
            residual.shape[1],
            epsilon,
            int(residual.dtype == torch.bfloat16),
        )

    def silu_times(self, both: torch.Tensor) -> torch.Tensor:
        """As `LayerOps.silu_times`."""
        count, width = both.shape[0], both.shape[1] // 2
        target = both.new_empty(count, width)
        is_bfloat16 = int(both.dtype == torch.bfloat16)
        self._silu_times(both.data_ptr(), target.data_ptr(), count, width, is_bfloat16)
        return target
