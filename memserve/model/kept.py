"""Weights of a loaded model in memory that several workers of one device share: what lies where.

A *keeper* (`memserve.workers.keeper`) loads and packs the model, puts every tensor that it computes
with into one allocation, and describes them by a `KeptWeights`. A worker builds the same model without
any weights and takes the tensors in the same order. Values only, no torch.
"""

import math

import msgspec

from memserve.model.spec import ModelSpec
from memserve.pool.refs import DeviceMemory

ALIGNMENT = 256
"""Of every tensor: what the widest loads of CPUs and GPUs ask for, and more."""
SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "bfloat16": 2,
    "float16": 2,
    "int32": 4,
    "float32": 4,
} | {
    "int64": 8,
    "float64": 8,
}
"""Bytes of one element of the types that can be kept."""


class KeptTensor(msgspec.Struct, frozen=True, array_like=True):
    """One contiguous tensor, from byte `offset` of the allocation on."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * SIZES[self.dtype]


class KeptWeights(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model's weights, and how the model was built that they belong to."""

    spec: ModelSpec
    is_fused: bool
    """Whether it runs on the fast path, else on transformers' own."""
    num_bytes: int
    """Of the allocation."""
    tensors: list[KeptTensor]
    """In the order in which the model's building takes them; some may share their bytes."""
    num_workers: int
    """That have been planned to share them."""
    device: DeviceMemory | None = None
    """Where they lie on a GPU; None: in a file without a name, whose descriptor goes with this."""
