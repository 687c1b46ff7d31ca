"""Where the tensors come from that a model computes with.

Whoever builds a model passes each of its final tensors (packed matrices, embeddings, norms, biases,
buffers) through `Weights.final`, always in the same order. `OwnWeights` leaves them as they are.
`RecordedWeights` notes them, for a keeper that puts them where other processes can map them.
`MappedWeights` returns what a keeper has put there, for a model that was built on `meta`: without any
weights, but of the same shapes.
"""

from collections.abc import Iterator
from typing import Protocol, final

import torch
from torch import nn

from memserve.errors import UnsupportedModel
from memserve.model.kept import ALIGNMENT, SIZES, KeptTensor


class Weights(Protocol):
    """Where a model's tensors come from."""

    def begin(self, *, is_fused: bool) -> None:
        """A model's building begins; whatever came before belongs to one that was given up."""
        ...

    def final(self, tensor: torch.Tensor) -> torch.Tensor:
        """What to compute with in place of this."""
        ...


@final
class OwnWeights:
    """The tensors as they were loaded."""

    def begin(self, *, is_fused: bool) -> None:
        """See `Weights.begin`."""

    def final(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Weights.final`."""
        return tensor


@final
class RecordedWeights:
    """As `OwnWeights`, but `tensors` has them all in the order in which they came."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.is_fused = False

    def begin(self, *, is_fused: bool) -> None:
        """See `Weights.begin`."""
        self.tensors.clear()
        self.is_fused = is_fused

    def final(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Weights.final`."""
        self.tensors.append(tensor)
        return tensor

    def table(self) -> tuple[list[KeptTensor], int]:
        """Where each is to lie in one allocation, and its size in bytes.

        Tensors that are one, as tied embeddings are, get one place. Raises `UnsupportedModel` for a
        tensor that can't be copied byte by byte.
        """
        places: dict[tuple[int, tuple[int, ...], str], int] = {}
        table, end = [], 0
        for tensor in self.tensors:
            kept = KeptTensor(0, tuple(tensor.shape), dtype_name(tensor))
            if tensor.layout != torch.strided or kept.dtype not in SIZES:
                raise UnsupportedModel(f"a tensor of {kept.dtype}, {tensor.layout} can't be shared")
            place = (tensor.data_ptr(), kept.shape, kept.dtype)
            if place not in places:
                places[place] = end
                end += -(-kept.num_bytes // ALIGNMENT) * ALIGNMENT
            table.append(KeptTensor(places[place], kept.shape, kept.dtype))
        return table, end

    def to_host(self) -> None:
        """Move all to host memory, so that a GPU has room for the shared copy."""
        moved: dict[int, torch.Tensor] = {}
        for index, tensor in enumerate(self.tensors):
            address = tensor.data_ptr()
            if address not in moved or moved[address].shape != tensor.shape:
                moved[address] = tensor.cpu()
            self.tensors[index] = moved[address]

    def move_into(self, memory: torch.Tensor, table: list[KeptTensor]) -> None:
        """Copy all into `memory`, uint8, and let each go as soon as it is there."""
        self.tensors.reverse()
        for kept in table:
            view(memory, kept).copy_(self.tensors.pop())


@final
class MappedWeights:
    """What a keeper has put into `memory`, uint8, in the order of its table."""

    def __init__(self, table: list[KeptTensor], memory: torch.Tensor) -> None:
        self._left: Iterator[KeptTensor] = iter(table)
        self._memory = memory

    def begin(self, *, is_fused: bool) -> None:
        """See `Weights.begin`; it begins but once."""

    def final(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Weights.final`. Raises `UnsupportedModel` unless the next kept one is like it."""
        kept = next(self._left, None)
        asked = (tuple(tensor.shape), dtype_name(tensor))
        if kept is None or (kept.shape, kept.dtype) != asked:
            raise UnsupportedModel(f"the kept weights have {kept} where the model needs {asked}")
        return view(self._memory, kept)

    def check_end(self) -> None:
        """Raise `UnsupportedModel` if the model has left any of them."""
        if (kept := next(self._left, None)) is not None:
            raise UnsupportedModel(f"the kept weights have {kept}, which the model does not need")


def settle(module: nn.Module, weights: Weights) -> None:
    """Give a module and its parts the final tensors for all that they hold, and haven't given away.

    Parameters, buffers, and tensors that are mere attributes.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.numel():
                data = parameter.data
                tensor = weights.final(data)
                if tensor is not data:
                    setattr(part, name, nn.Parameter(tensor, requires_grad=False))
        attributes = [(name, each) for name, each in vars(part).items() if torch.is_tensor(each)]
        for name, each in [*part.named_buffers(recurse=False, remove_duplicate=False), *attributes]:
            setattr(part, name, weights.final(each))


def view(memory: torch.Tensor, kept: KeptTensor) -> torch.Tensor:
    """The tensor in this memory."""
    dtype: torch.dtype = getattr(torch, kept.dtype)
    return memory[kept.offset :][: kept.num_bytes].view(dtype).view(kept.shape)


def dtype_name(tensor: torch.Tensor) -> str:
    """Such as `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")
