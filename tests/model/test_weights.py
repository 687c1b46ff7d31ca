"""Tensors that a model's building passes on: noted, laid out, moved, and taken by another building."""

import pytest
import torch
from torch import nn

from memserve.errors import UnsupportedModel
from memserve.model.kept import ALIGNMENT, KeptTensor
from memserve.model.weights import MappedWeights, OwnWeights, RecordedWeights, Weights, settle


class Odd(nn.Module):
    """Everything that a module can hold."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(3, 5, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.5))
        self.attribute = torch.arange(4)

    def values(self) -> list[torch.Tensor]:
        return [self.first.weight, self.first.bias, self.second.weight, self.scale, self.attribute]


def record(module: nn.Module) -> RecordedWeights:
    recorded = RecordedWeights()
    recorded.begin(is_fused=False)
    settle(module, recorded)
    return recorded


def moved(recorded: RecordedWeights) -> tuple[list[KeptTensor], torch.Tensor]:
    table, num_bytes = recorded.table()
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    recorded.move_into(memory, table)
    return table, memory


def test_a_module_without_values_gets_those_of_another() -> None:
    original = Odd()
    table, memory = moved(record(original))
    with torch.device("meta"):
        skeleton = Odd()
    weights = MappedWeights(table, memory)
    settle(skeleton, weights)
    weights.check_end()
    for got, want in zip(skeleton.values(), original.values(), strict=True):
        assert torch.equal(got, want)
        assert memory.data_ptr() <= got.data_ptr() < memory.data_ptr() + memory.numel()
    rows = torch.ones(2, 3)
    assert torch.equal(skeleton.second(rows), original.second(rows))


def test_tied_tensors_have_one_place_and_every_place_is_aligned() -> None:
    recorded = record(Odd())
    table, num_bytes = recorded.table()
    assert len(table) == 5
    by_shape = [kept for kept in table if kept.shape == (5, 3)]
    assert by_shape[0] == by_shape[1]
    assert {kept.offset % ALIGNMENT for kept in table} == {0}
    assert num_bytes == 4 * ALIGNMENT


def test_what_an_abandoned_building_has_passed_on_is_forgotten() -> None:
    recorded = RecordedWeights()
    recorded.begin(is_fused=True)
    recorded.final(torch.zeros(7))
    recorded.begin(is_fused=False)
    recorded.final(torch.ones(3))
    assert [tuple(each.shape) for each in recorded.tensors] == [(3,)]
    assert not recorded.is_fused


def test_tensors_are_let_go_as_they_are_moved() -> None:
    recorded = record(Odd())
    moved(recorded)
    assert not recorded.tensors


def test_moving_to_host_memory_keeps_ties_and_values() -> None:
    original = Odd()
    recorded = record(original)
    recorded.to_host()
    tied = [each for each in recorded.tensors if each.shape == (5, 3)]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert torch.equal(tied[0], original.first.weight)


@pytest.mark.parametrize(
    "weights", [OwnWeights(), RecordedWeights()], ids=lambda w: type(w).__name__
)
def test_a_module_that_shares_nothing_keeps_its_own_parameters(weights: Weights) -> None:
    module = Odd()
    before = [*module.parameters()]
    settle(module, weights)
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    "asked", [torch.empty(4, 2), torch.empty(2, 4, dtype=torch.bfloat16)], ids=["shape", "dtype"]
)
def test_a_tensor_unlike_the_kept_one_is_refused(asked: torch.Tensor) -> None:
    recorded = RecordedWeights()
    recorded.final(torch.zeros(2, 4))
    table, memory = moved(recorded)
    with pytest.raises(UnsupportedModel, match="where the model needs"):
        MappedWeights(table, memory).final(asked.to("meta"))


def test_a_model_that_needs_more_or_fewer_tensors_is_refused() -> None:
    recorded = RecordedWeights()
    recorded.final(torch.zeros(2))
    table, memory = moved(recorded)
    weights = MappedWeights(table, memory)
    with pytest.raises(UnsupportedModel, match="does not need"):
        weights.check_end()
    weights = MappedWeights(table, memory)
    weights.final(torch.zeros(2))
    with pytest.raises(UnsupportedModel, match="have None"):
        weights.final(torch.zeros(2))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64)],
    ids=["layout", "type"],
)
def test_a_tensor_that_is_no_plain_memory_cannot_be_shared(tensor: torch.Tensor) -> None:
    recorded = RecordedWeights()
    recorded.final(tensor)
    with pytest.raises(UnsupportedModel, match="can't be shared"):
        recorded.table()
