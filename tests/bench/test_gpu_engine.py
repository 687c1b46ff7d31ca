"""What the GPU benchmark of one model is made of; its figures need a GPU."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memserve.bench.gpu_engine import (
    BLOCK_SIZE,
    Decode,
    Prefill,
    Shape,
    decode_step,
    render,
    shapes,
)
from memserve.bench.gpu_overlap import EngineStep, engine_steps
from memserve.model.loading import load_model
from tests.model.tiny import ARCHITECTURES, save


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", 8.03), ("llama-2-13b", 13.02), ("qwen3-4b", 4.41)]
)
def test_the_shapes_are_those_of_the_models_they_stand_for(name: str, billions: float) -> None:
    # Qwen3-4B ties its embeddings; here they count twice, since the head is read by every step.
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(shapes()[name])
    assert round(module.num_parameters() / 1e9, 2) == billions


def test_a_decode_step_reads_every_sequence_s_own_blocks() -> None:
    step = decode_step(3, 40, 20)
    assert step.block_table.shape == (3, -(-40 // BLOCK_SIZE))
    assert len(set(step.block_table.flatten().tolist())) == 9
    assert step.positions.tolist() == [39] * 3


def test_the_table_names_what_had_no_room() -> None:
    shape = Shape(
        name="llama-2-13b",
        attention="triton",
        weight_bytes=26 << 30,
        kv_dtype="float8_e4m3fn",
        read_gb_s=3000.0,
        decode=[Decode(64, 1024, 30.0, 27.0)],
        prefill=[Prefill(2048, 100.0, 300.0, 600.0)],
        engine=[EngineStep(64, 1024, 35.0, 30.5)],
        no_room=[(256, 8192)],
    )
    table = render([shape])
    assert "KV in float8_e4m3fn" in table
    assert "30.00 ms a step,  90% of the bandwidth" in table
    assert "35.00 ms a step, 30.50 launched ahead" in table
    assert "50% of a large product" in table
    assert "256 x  8192: no room" in table


def test_an_engine_s_steps_are_timed_both_ways_where_the_arena_has_room(tmp_path: Path) -> None:
    folder = save(ARCHITECTURES["llama"].config(), tmp_path)
    model = load_model(
        folder, device="cpu", dtype="float32", max_model_len=None, block_size=BLOCK_SIZE
    )
    spec = model.spec
    arena = torch.zeros(
        25, spec.num_layers, 2, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype=torch.float32
    )
    steps = engine_steps(model, arena, None, batches=(1, 3, 30), context=40, num_steps=4)
    assert [(each.batch, each.context) for each in steps] == [(1, 40), (3, 40)]
    assert all(each.milliseconds > 0 < each.ahead_milliseconds for each in steps)
