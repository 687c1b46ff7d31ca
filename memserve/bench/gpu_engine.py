"""Decode and prefill of one model on one GPU beside what the GPU allows, for models of real shapes.

The weights are random, built from the configurations below; nothing is downloaded. A decode step is
one replay of its graph and no sampling; its floor is the bytes of weights and KV that it must read
over the best rate at which this process reads or copies memory. A prefill is one prompt in one step;
its ceiling is a large matrix product. Times are medians of CUDA events, so the host's work counts
only where the GPU waits for it. Steps of the whole engine stand beside them (`gpu_overlap`).

`python -m memserve.bench.gpu_engine` prints a table and one JSON line. Needs a GPU.
"""

import argparse
import functools
import gc
import statistics
import sys
from collections.abc import Callable, Iterable

import msgspec
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from memserve.bench import gpu_overlap
from memserve.bench.gpu_overlap import EngineStep
from memserve.errors import UsageError
from memserve.model.graphs import DecodeGraphs, cuda_recorder
from memserve.model.loading import assemble
from memserve.model.model import Model
from memserve.model.step import StepInput, one_sequence
from memserve.pool.refs import KVCacheDType, KVDType

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192 + 64
BATCHES = (1, 8, 64, 256)
CONTEXTS = (1024, 8192)
PROMPTS = (2048, 8192)
ENGINE_BATCHES, ENGINE_STEPS = (1, 8, 64), 40
WARM_UPS, ROUNDS = 3, 10
MATMUL_SIZE = 8192
READ_BYTES = 2 << 30
SPARE_BYTES = 2560 << 20
"""Of the GPU's free memory, left to steps beside the arena."""


class Decode(msgspec.Struct, frozen=True):
    """One step of `batch` sequences of `context` tokens each."""

    batch: int
    context: int
    milliseconds: float
    floor_milliseconds: float

    @property
    def share(self) -> float:
        """Of the bandwidth that it could use, the part that it does."""
        return self.floor_milliseconds / self.milliseconds


class Prefill(msgspec.Struct, frozen=True):
    """One prompt of `num_tokens`."""

    num_tokens: int
    milliseconds: float
    tflop_s: float
    matmul_tflop_s: float

    @property
    def share(self) -> float:
        """Of the matrix product's rate, the part that it reaches."""
        return self.tflop_s / self.matmul_tflop_s


class Shape(msgspec.Struct, frozen=True):
    """All figures of one model."""

    name: str
    attention: str
    weight_bytes: int
    kv_dtype: KVDType
    read_gb_s: float
    decode: list[Decode]
    prefill: list[Prefill]
    engine: list[EngineStep]
    no_room: list[tuple[int, int]]
    """(batch, context) whose KV didn't fit beside the weights."""


def shapes() -> dict[str, PretrainedConfig]:
    """The models, by name."""
    limits = {"max_position_embeddings": MAX_MODEL_LEN, "tie_word_embeddings": False}
    return {
        "llama-3.1-8b": LlamaConfig(
            **limits,
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        "llama-2-13b": LlamaConfig(
            **limits,
            vocab_size=32000,
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        ),
        "qwen3-4b": Qwen3Config(
            **limits,
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        ),
    }


def random_model(config: PretrainedConfig, device: torch.device) -> Model:
    """A model of this configuration in bfloat16 with weights drawn on the device."""

    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        with device:
            module: torch.nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="eager"
            )
        return module

    return assemble(
        load,
        config,
        device=device,
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
    )


def measure(name: str, device: torch.device, kv_cache_dtype: KVCacheDType = "auto") -> Shape:
    """All figures of one of the shapes."""
    config = shapes()[name]
    read = read_rate(device)
    matmul = matmul_rate(device)
    before = torch.cuda.memory_allocated(device)
    model = random_model(config, device)
    weight_bytes = torch.cuda.memory_allocated(device) - before
    # The embedding is looked up, row by row; all other weights are read by every step.
    embedding = config.vocab_size * config.hidden_size
    read_weights = weight_bytes - 2 * embedding
    layout = model.spec.block_layout(BLOCK_SIZE, kv_cache_dtype)
    block_bytes = layout.block_bytes
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    num_blocks = max(0, free - SPARE_BYTES) // block_bytes
    kept: torch.dtype = getattr(torch, layout.dtype)
    arena = torch.zeros((num_blocks, *layout.block_shape), dtype=kept, device=device)
    layers = read_weights // 2 - embedding  # without the output layer
    prefill = [prefill_of(model, arena, count, layers, embedding, matmul) for count in PROMPTS]
    graphs = DecodeGraphs(
        model,
        arena,
        max_num_seqs=max(BATCHES),
        max_model_len=MAX_MODEL_LEN,
        record=cuda_recorder(),
    )
    decode, no_room = [], []
    for batch in BATCHES:
        for context in CONTEXTS:
            if batch * blocks_of(context) > len(arena):
                no_room.append((batch, context))
                continue
            step = decode_step(batch, context, len(arena))
            seconds = seconds_of(functools.partial(graphs.forward, step))
            kv_bytes = batch * context * block_bytes // BLOCK_SIZE
            floor = (read_weights + kv_bytes) / read
            decode.append(Decode(batch, context, seconds * 1e3, floor * 1e3))
    engine = gpu_overlap.engine_steps(
        model,
        arena,
        graphs,
        batches=ENGINE_BATCHES,
        context=CONTEXTS[0],
        num_steps=ENGINE_STEPS,
    )
    return Shape(
        name,
        model.attention,
        weight_bytes,
        layout.dtype,
        read / 1e9,
        decode,
        prefill,
        engine,
        no_room,
    )


def prefill_of(
    model: Model, arena: torch.Tensor, num_tokens: int, layers: int, head: int, matmul: float
) -> Prefill:
    """One prompt. Counted are the products with the weights and causal attention's two.

    `layers` weights meet every token, those of the `head` only the last one.
    """
    spec = model.spec
    token_ids = torch.randint(spec.vocab_size, (num_tokens,))
    blocks = torch.randperm(len(arena))[None, : blocks_of(num_tokens)].int()
    step = one_sequence(token_ids, blocks, num_outputs=1).to(arena.device)
    seconds = seconds_of(lambda: model.forward(step, arena))
    attention = 2 * num_tokens**2 * spec.num_query_heads * spec.head_dim * spec.num_layers
    flop = 2 * layers * num_tokens + 2 * head + attention
    return Prefill(num_tokens, seconds * 1e3, flop / seconds / 1e12, matmul / 1e12)


def decode_step(batch: int, context: int, num_blocks: int) -> StepInput:
    """The next token of `batch` sequences that have `context` tokens with it, on the CPU."""
    width = blocks_of(context)
    return StepInput(
        token_ids=torch.randint(1000, (batch,)),
        positions=torch.full((batch,), context - 1),
        query_start=torch.arange(batch + 1, dtype=torch.int32),
        kv_len=torch.full((batch,), context, dtype=torch.int32),
        block_table=torch.randperm(num_blocks)[: batch * width].view(batch, width).int(),
        output_rows=torch.arange(batch),
    )


def blocks_of(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def read_rate(device: torch.device) -> float:
    """Bytes per second that a sum reads, or a copy reads and writes, whichever is faster."""
    source = torch.ones(READ_BYTES // 4, device=device)
    target = torch.empty_like(source)
    summed = READ_BYTES / seconds_of(source.sum)
    return max(summed, 2 * READ_BYTES / seconds_of(lambda: target.copy_(source)))


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large square product in bfloat16."""
    a, b = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    return 2 * MATMUL_SIZE**3 / seconds_of(lambda: a @ b)


def seconds_of(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    for _ in range(WARM_UPS):
        run()
    taken: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def render(measured: Iterable[Shape]) -> str:
    """The figures as a table for people."""
    lines = []
    for shape in measured:
        lines.append(
            f"{shape.name}: weights {shape.weight_bytes / 2**30:.1f} GiB, "
            f"KV in {shape.kv_dtype}, reads {shape.read_gb_s:,.0f} GB/s, attention {shape.attention}"
        )
        lines += [
            f"  decode {each.batch:>4} x {each.context:>5}: {each.milliseconds:8.2f} ms a step, "
            f"{each.share:4.0%} of the bandwidth"
            for each in shape.decode
        ]
        lines += gpu_overlap.render(shape.engine)
        lines += [f"  decode {b:>4} x {c:>5}: no room for its KV" for b, c in shape.no_room]
        lines += [
            f"  prefill {each.num_tokens:>9}: {each.milliseconds:8.2f} ms, "
            f"{each.tflop_s:5.0f} TFLOP/s, {each.share:4.0%} of a large product"
            for each in shape.prefill
        ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="gpu_engine")
    parser.add_argument("--shapes", nargs="+", choices=sorted(shapes()), default=sorted(shapes()))
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device())
    measured = []
    for name in options.shapes:
        measured.append(measure(name, device, options.kv_cache_dtype))
        gc.collect()  # a model's modules refer to each other
        torch.cuda.empty_cache()
    sys.stdout.write(f"{render(measured)}\n{msgspec.json.encode(measured).decode()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
