"""What the machine allows, measured in the same process with the same threads as the engine.

`ReadBandwidth` gives the floor of a decode step, which must read every weight and every key and value
once: no step is faster than those bytes over the rate at which this process can read. `LinearLayers`
gives the ceiling of prefill, which can't be faster than its matrix products alone.
"""

import statistics
import time
from typing import Any

import torch

from memserve.bench.records import MATMUL_KINDS
from memserve.model.spec import ModelSpec
from memserve.pool.refs import DTYPE_BYTES


class ReadBandwidth:
    """How fast this process reads memory, sampled between other measurements.

    Two kernels that do next to nothing but read (a sum over one run, a dot product of two) pass over
    a large buffer, and over a part of it that is as big as the model's weights: a cache that holds
    the part would hold the weights as well from one step to the next, so its speed belongs to the
    floor. The rate is the best of the four medians; anything less would be no floor.
    """

    def __init__(self, buffer_bytes: int, weight_bytes: int) -> None:
        whole = torch.ones(buffer_bytes // 4)
        part = whole[: max(2, min(weight_bytes, buffer_bytes) // 8 * 2)]
        self._runs = (whole, part)
        self._rates: dict[tuple[int, str], list[float]] = {}

    def sample(self) -> None:
        """Measure each buffer with each kernel once."""
        for run in self._runs:
            half = run.numel() // 2
            run.sum()  # the pass before leaves in the cache what it can
            self._time(run, "sum", lambda run=run: run.sum())
            self._time(run, "dot", lambda run=run, half=half: torch.dot(run[:half], run[-half:]))

    @property
    def bytes_per_s(self) -> float:
        """The best rate seen, by medians of its samples."""
        return max(statistics.median(rates) for rates in self._rates.values())

    def _time(self, run: torch.Tensor, kernel: str, read: Any) -> None:  # noqa: ANN401
        start = time.perf_counter()
        read()
        seconds = time.perf_counter() - start
        self._rates.setdefault((run.numel(), kernel), []).append(run.nbytes / seconds)


class LinearLayers:
    """The matrix products of a model's linear layers, and nothing else of it.

    The output head is left out: prefill needs one row of it. Weights that aren't `nn.Linear` (experts
    kept in one tensor, GPT-2's Conv1D) are not counted.
    """

    def __init__(self, module: Any) -> None:  # noqa: ANN401
        head = module.get_output_embeddings()
        self._weights: list[torch.Tensor] = [
            layer.weight.detach()
            for layer in module.modules()
            if isinstance(layer, torch.nn.Linear) and layer is not head
        ]

    def seconds(self, rows: int, kind: MATMUL_KINDS) -> float:
        """Time of all products [rows, in] x [in, out] in the model's order and dtype.

        `prepacked` repacks every weight for oneDNN beforehand, outside the measured time.
        """
        inputs = {
            weight.shape[1]: torch.randn(rows, weight.shape[1], dtype=weight.dtype)
            for weight in self._weights
        }
        if kind == "plain":
            start = time.perf_counter()
            for weight in self._weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            return time.perf_counter() - start
        mkldnn = torch.ops.mkldnn
        packed = [
            (inputs[w.shape[1]], mkldnn._reorder_linear_weight(w, rows))  # noqa: SLF001
            for w in self._weights
        ]
        multiply = mkldnn._linear_pointwise.default  # noqa: SLF001
        start = time.perf_counter()
        for activations, packed_weight in packed:
            multiply(activations, packed_weight, None, "none", [], "")
        return time.perf_counter() - start


def weight_bytes(module: Any) -> int:  # noqa: ANN401
    """Bytes of weights that every decode step reads: all but an embedding table that is no head.

    For a mixture of experts this counts all of them, more than a small batch reads.
    """
    total: int = sum(weight.nbytes for weight in module.parameters())
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if not tied:
        total -= embedding.weight.nbytes
    return total


def kv_bytes_per_token(spec: ModelSpec) -> int:
    """Bytes of K and V of one token of context, all layers; windows are not deducted."""
    values = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
    return values * DTYPE_BYTES[spec.dtype]
