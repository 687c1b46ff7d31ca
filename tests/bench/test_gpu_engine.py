"""What the GPU benchmark of one model is made of; its figures need a GPU."""

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
        no_room=[(256, 8192)],
    )
    table = render([shape])
    assert "KV in float8_e4m3fn" in table
    assert "30.00 ms a step,  90% of the bandwidth" in table
    assert "50% of a large product" in table
    assert "256 x  8192: no room" in table
