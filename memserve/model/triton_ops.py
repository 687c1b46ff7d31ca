"""The small operators of a decoder layer on a GPU, by our Triton kernels."""

import torch

from memserve.model.attention.triton_paged import power_of_two
from memserve.model.kernels.layers import add_norm, silu_times

SILU_LANES = 1024
WIDE = 4096
"""Elements of a row from which more warps share it."""


class TritonLayerOps:
    """As `LayerOps`; launches only, nothing waits for the device."""

    def add_norm(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        target: torch.Tensor,
        epsilon: float,
    ) -> None:
        """As `LayerOps.add_norm`."""
        count, width = residual.shape
        add_norm[(count,)](
            residual,
            residual if delta is None else delta,
            weight,
            target,
            epsilon,
            HAS_DELTA=delta is not None,
            WIDTH=width,
            LANES=power_of_two(width),
            num_warps=8 if width >= WIDE else 4,
        )

    def silu_times(self, both: torch.Tensor) -> torch.Tensor:
        """As `LayerOps.silu_times`."""
        count, width = both.shape[0], both.shape[1] // 2
        target = both.new_empty(count, width)
        silu_times[(count, -(-width // SILU_LANES))](both, target, WIDTH=width, LANES=SILU_LANES)
        return target
