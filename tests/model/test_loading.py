"""Which models are served by which path, and which are refused, with the reason."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from memserve.errors import ModelNotFound, UnsupportedModel
from memserve.model import loading
from memserve.model.attention.paged import PagedAttention, PagedBatch
from memserve.model.fused import FusedDecoder
from memserve.model.loading import load_model
from memserve.model.model import Model, Transformer
from memserve.model.prepared import PreparedModel
from memserve.model.step import StepInput
from memserve.model.support import check_config
from memserve.pool.refs import DType
from tests.model.paging import Arena, assert_same, run_chunks, step_of
from tests.model.tiny import ARCHITECTURES, COMMON, VOCAB, build, save

BLOCK = 4


def load(folder: Path, dtype: DType = "float32", max_model_len: int | None = None) -> Model:
    return load_model(
        folder, device="cpu", dtype=dtype, max_model_len=max_model_len, block_size=BLOCK
    )


def common(name: str, **fields: object) -> PretrainedConfig:
    made: PretrainedConfig = getattr(transformers, name)(**{**COMMON, **fields})
    return made


DYNAMIC = {
    "rope_type": "dynamic",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
}

REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "encoder-decoder": (transformers.T5Config, "encoder-decoder"),
    "encoder": (transformers.ViTConfig, "no causal language model"),
    "state space": (transformers.MambaConfig, "linear_attention"),
    "recurrent": (transformers.RwkvConfig, "recurrent"),
    "linear attention": (transformers.Qwen3NextConfig, "linear_attention"),
    "latent attention": (transformers.DeepseekV3Config, "MLA"),
    "chunked attention": (transformers.Llama4TextConfig, "chunked_attention"),
    "soft cap": (transformers.Gemma2Config, "soft-capped"),
    "shared KV": (transformers.Gemma3nTextConfig, "shared between layers"),
    "odd head size": (lambda: common("LlamaConfig", head_dim=12), "multiple of 8"),
    "wide heads": (lambda: common("LlamaConfig", head_dim=512), "multiple of 8 up to 256"),
    "dynamic rotary": (lambda: common("LlamaConfig", rope_parameters=DYNAMIC), "dynamic rotary"),
    "other attention": (transformers.BloomConfig, "can't be replaced"),
}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_cannot_be_served_is_refused_with_the_reason(family: str) -> None:
    build_config, reason = REFUSED[family]
    with pytest.raises(UnsupportedModel, match=reason):
        check_config(build_config())


def test_attention_sinks_are_refused_when_the_layers_ask_for_them(tmp_path: Path) -> None:
    config = common(
        "GptOssConfig",
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    with pytest.raises(UnsupportedModel, match="s_aux"):
        load(save(config, tmp_path))


def test_a_layer_with_another_window_than_configured_is_refused(tmp_path: Path) -> None:
    # Qwen3-MoE's layers all take the window, whatever `layer_types` says.
    config = ARCHITECTURES["qwen3-moe"].config()
    config.use_sliding_window = True
    config.sliding_window = 9
    config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="window of 9 tokens"):
        load(save(config, tmp_path))


@pytest.mark.parametrize(
    ("layers", "heads", "reason"),
    [([0, 0], 2, "share KV"), ([0, 5], 2, "another way"), ([0], 4, "differ in KV heads")],
)
def test_layers_that_do_not_fit_the_arena_are_refused(
    layers: list[int], heads: int, reason: str
) -> None:
    step = StepInput(
        token_ids=torch.zeros(3, dtype=torch.int64),
        positions=torch.arange(3),
        query_start=torch.tensor([0, 3], dtype=torch.int32),
        kv_len=torch.tensor([3], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        output_rows=torch.tensor([2]),
    )
    attention = PagedAttention(None, num_query_heads=4, windows=[None, None])
    batch = attention.begin(step, torch.zeros(1, 2, 2, 4, 2, 8))
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, heads, 3, 8)
    *fitting, last = layers
    for layer in fitting:
        batch.check(layer, query, key, key)
    with pytest.raises(UnsupportedModel, match=reason):
        batch.check(last, query, key, key)


def test_a_model_whose_paged_logits_differ_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = PagedBatch.attend

    def wrong(self: PagedBatch, layer: int, *args: object, **rest: object) -> None:
        honest(self, 0, *args, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PagedBatch, "attend", wrong)
    with pytest.raises(UnsupportedModel, match="differ from its own"):
        load(save(ARCHITECTURES["olmo2"].config(), tmp_path))


def test_a_folder_without_a_checkpoint_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        load(tmp_path)


def test_unknown_devices_and_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="tpu"):
        load_model(tmp_path, device="tpu", dtype="float32", max_model_len=None, block_size=4)
    with pytest.raises(UnsupportedModel, match="float16"):
        load(tmp_path, dtype="float16")


def test_a_longer_limit_than_the_model_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="256 tokens, not 300"):
        load(save(ARCHITECTURES["llama"].config(), tmp_path), max_model_len=300)


FUSED = {
    "llama": True,
    "llama3-rope": True,
    "llama-tied-mha": True,
    "mistral": True,
    "qwen2": True,
    "qwen2-windows": True,
    "qwen3": True,
    "gemma3": False,
    "phi3": False,
    "olmo2": False,
    "gpt-neox": False,
    "qwen3-moe": False,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_plain_decoders_are_fused_and_all_others_run_as_they_are(
    name: str, dtype: DType, tmp_path: Path
) -> None:
    model = load(save(ARCHITECTURES[name].config(), tmp_path), dtype)
    assert type(model._network) is (FusedDecoder if FUSED[name] else Transformer)
    assert model.attention == "cpu-native"
    assert model.spec.dtype == dtype


def test_the_spec_tells_the_shape(tmp_path: Path) -> None:
    spec = load(save(ARCHITECTURES["qwen3"].config(), tmp_path)).spec
    assert spec.architecture == "Qwen3ForCausalLM"
    assert (spec.num_layers, spec.num_query_heads, spec.num_kv_heads) == (3, 4, 2)
    assert (spec.head_dim, spec.vocab_size, spec.max_model_len) == (32, VOCAB, 256)
    assert spec.eos_token_ids == (2,)


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def reference(config: PretrainedConfig, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = build(config)(input_ids=tokens[None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen2-windows"])
def test_without_a_compiler_sdpa_serves_and_the_log_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "load_kernels", lambda: None)
    config = ARCHITECTURES[name].config()
    with caplog.at_level(logging.WARNING):
        model = load(save(config, tmp_path))
    assert model.attention == "cpu-sdpa"
    assert "no compiled attention kernel" in caplog.text
    tokens = tokens_of(44)
    arena = Arena(model, BLOCK)
    got = run_chunks(model, arena, arena.sequence(tokens), (21, 1, 1, 2, 19))
    assert_same(got, reference(config, tokens))


def test_a_fused_path_that_disagrees_is_left_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = FusedDecoder.forward
    monkeypatch.setattr(FusedDecoder, "forward", lambda self, batch: honest(self, batch) * 1.1)
    config = ARCHITECTURES["llama"].config()
    with caplog.at_level(logging.WARNING):
        model = load(save(config, tmp_path))
    assert type(model._network) is Transformer
    assert "fused path can't serve" in caplog.text
    tokens = tokens_of(30)
    arena = Arena(model, BLOCK)
    got = run_chunks(model, arena, arena.sequence(tokens), (20, 10))
    assert_same(got, reference(config, tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_without_wanted_logits_writes_its_kv_and_gives_none(
    name: str, dtype: DType, tmp_path: Path
) -> None:
    model = load(save(ARCHITECTURES[name].config(), tmp_path), dtype)
    arena = Arena(model, BLOCK)
    step = step_of([(arena.sequence(tokens_of(6)), 6)])
    none = dataclasses.replace(step, output_rows=torch.zeros(0, dtype=torch.int64))
    assert model.forward(none, arena.tensor).shape == (0, VOCAB)
    written = ~arena.tensor[step.block_table[0].long()].isnan()
    assert written.flatten(4).all(-1).sum((0, 1, 2)).tolist() == [12, 12, 6, 6]


def longrope() -> PretrainedConfig:
    return common(
        "Phi3Config",
        sliding_window=None,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
            "original_max_position_embeddings": 32,
        },
    )


@pytest.mark.parametrize(("limit", "length"), [(None, 50), (32, 30)], ids=["long", "short"])
def test_longrope_uses_the_frequencies_of_the_longest_text_throughout(
    limit: int | None, length: int, tmp_path: Path
) -> None:
    model = load(save(longrope(), tmp_path), max_model_len=limit)
    tokens = tokens_of(length)
    arena = Arena(model, BLOCK)
    # The first chunk alone is short enough for the short set.
    got = run_chunks(model, arena, arena.sequence(tokens), (20, 1, length - 21))
    assert_same(got, reference(longrope(), tokens))


def test_the_demo_model_equals_transformers(demo_model: PreparedModel) -> None:
    weights = Path(demo_model.weights)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.float32, attn_implementation="eager"
    )
    model = load_model(weights, device="cpu", dtype="float32", max_model_len=None, block_size=16)
    assert type(model._network) is FusedDecoder
    tokens = torch.randint(100, 40_000, (75,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = module(input_ids=tokens[None], use_cache=False).logits[0]
    for chunks in ((75,), (33, 1, 1, 17, 5, 18)):
        arena = Arena(model, 16)
        assert_same(run_chunks(model, arena, arena.sequence(tokens), chunks), want)
