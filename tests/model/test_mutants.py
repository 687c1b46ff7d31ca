"""The comparisons of `test_architectures` must notice what they are there to notice."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memserve.model.attention.batch import Attention, Batch
from memserve.model.fused import FusedDecoder
from memserve.model.loading import load_model
from memserve.model.model import Model, Transformer
from memserve.model.step import LayerWritten, StepInput
from tests.model.paging import Arena, assert_same, run_chunks
from tests.model.tiny import ARCHITECTURES, VOCAB, build, save

BLOCK = 4
CHUNKS = (9, 20, 1, 1, 6)

MUTANTS = ["llama", "mistral", "gemma3", "gpt-neox"]
"""On the fused path and on transformers', with and without windows."""


class Mutant:
    """A model's attention with one thing wrong."""

    def __init__(
        self,
        attention: Attention,
        *,
        step: Callable[[StepInput], StepInput] = lambda step: step,
        shift_window: int = 0,
    ) -> None:
        self._attention = attention
        self._step = step
        self._shift = shift_window

    def begin(
        self, step: StepInput, arena: torch.Tensor, written: LayerWritten | None = None
    ) -> Batch:
        batch = self._attention.begin(self._step(step), arena, written)
        attend = batch.attend

        def shifted(*args: Any, window: int | None, **rest: Any) -> None:
            attend(*args, window=None if window is None else window + self._shift, **rest)

        batch.attend = shifted  # type: ignore[method-assign]
        return batch


def with_a_wrong_block(step: StepInput) -> StepInput:
    """From the second chunk on, blocks 4 to 7 are read in the place of 0 to 3, too.

    (Whole blocks that merely change places are no mistake: keys carry their positions.)
    """
    table = step.block_table.clone()
    if int(step.positions.min()) >= CHUNKS[0]:
        table[:, :4] = table[:, 4:8]
    return dataclasses.replace(step, block_table=table)


def compare(name: str, tmp_path: Path, mutate: Callable[[Model], None]) -> None:
    """The comparison of `test_architectures`, with something wrong in the model."""
    config = ARCHITECTURES[name].config()
    folder = save(config, tmp_path)
    model = load_model(folder, device="cpu", dtype="float32", max_model_len=None, block_size=BLOCK)
    mutate(model)
    tokens = torch.randint(3, VOCAB, (sum(CHUNKS),), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = build(config)(input_ids=tokens[None], use_cache=False).logits[0]
    arena = Arena(model, BLOCK)
    assert_same(run_chunks(model, arena, arena.sequence(tokens), CHUNKS), want)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_unchanged_model_passes(name: str, tmp_path: Path) -> None:
    def wrap(model: Model) -> None:
        model._attention = Mutant(model._attention)  # type: ignore[assignment]

    compare(name, tmp_path, wrap)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_block_table_is_noticed(name: str, tmp_path: Path) -> None:
    def wrap(model: Model) -> None:
        wrong = Mutant(model._attention, step=with_a_wrong_block)
        model._attention = wrong  # type: ignore[assignment]

    with pytest.raises(AssertionError, match="logits differ"):
        compare(name, tmp_path, wrap)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_off_by_one_is_noticed(name: str, shift: int, tmp_path: Path) -> None:
    def wrap(model: Model) -> None:
        wrong = Mutant(model._attention, shift_window=shift)
        model._attention = wrong  # type: ignore[assignment]

    with pytest.raises(AssertionError, match="logits differ"):
        compare(name, tmp_path, wrap)


@pytest.mark.parametrize("name", MUTANTS)
def test_skipped_rotary_positions_are_noticed(name: str, tmp_path: Path) -> None:
    def skip(model: Model) -> None:
        network = model._network
        if isinstance(network, FusedDecoder):
            rotary = network._rotary
        else:
            assert isinstance(network, Transformer)
            rotary = network._module.get_decoder().rotary_emb
        rotate = rotary.forward

        def still(x: torch.Tensor, position_ids: torch.Tensor, *rest: Any) -> Any:
            return rotate(x, torch.zeros_like(position_ids), *rest)

        rotary.forward = still

    with pytest.raises(AssertionError, match="logits differ"):
        compare(name, tmp_path, skip)
