"""The small random model is a checkpoint that memserve serves like any other."""

from pathlib import Path

import pytest

from memserve.bench.small_model import END, SMALL, TINY, VOCAB_SIZE, Shape, small_model
from memserve.model.loading import load_model
from memserve.model.prepare import prepare
from memserve.model.prepared import Progress
from memserve.tokens import Tokenizer
from memserve.workloads.catalog import VOCAB


def _ignore(progress: Progress) -> None:
    pass


@pytest.mark.parametrize("shape", [SMALL, TINY], ids=["small", "tiny"])
def test_it_is_prepared_and_loaded_and_has_room_for_every_workload(
    tmp_path: Path, shape: Shape
) -> None:
    folder = small_model(tmp_path, shape)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert small_model(tmp_path, shape) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp  # made once
    prepared = prepare(str(folder), cache=tmp_path, progress=_ignore)
    assert (prepared.vocab_size, prepared.max_model_len) == (VOCAB_SIZE, shape.max_model_len)
    assert prepared.eos_token_ids == (0,)
    assert max(VOCAB) < VOCAB_SIZE
    tokenizer = Tokenizer(prepared)
    assert tokenizer.encode(END, add_special_tokens=True) == [0]
    model = load_model(folder, device="cpu", dtype="float32", max_model_len=64, block_size=16)
    assert model.spec.vocab_size == VOCAB_SIZE
