"""Tiny random models of each architecture, saved as checkpoint folders, and their arenas.

The weights are drawn larger than usual, so that distant context matters to every logit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 97
WINDOW = 12

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Tiny:
    """How one architecture is built, and which of its layers must see a window."""

    config: Callable[[], PretrainedConfig]
    windowed: bool = False


def _config(name: str, **fields: object) -> Callable[[], PretrainedConfig]:
    def build() -> PretrainedConfig:
        made: PretrainedConfig = getattr(transformers, name)(**{**COMMON, **fields})
        return made

    return build


ARCHITECTURES = {
    "llama": Tiny(_config("LlamaConfig")),
    "llama-tied-mha": Tiny(
        _config("LlamaConfig", tie_word_embeddings=True, num_key_value_heads=4, head_dim=24)
    ),
    "llama3-rope": Tiny(
        _config(
            "LlamaConfig",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "mistral": Tiny(_config("MistralConfig", sliding_window=WINDOW, head_dim=16), windowed=True),
    "qwen2": Tiny(_config("Qwen2Config")),
    "qwen2-windows": Tiny(
        _config("Qwen2Config", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        windowed=True,
    ),
    "qwen3": Tiny(_config("Qwen3Config", head_dim=32)),
    "gemma3": Tiny(
        _config(
            "Gemma3TextConfig",
            sliding_window=WINDOW,
            head_dim=32,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=24,
        ),
        windowed=True,
    ),
    "phi3": Tiny(_config("Phi3Config", sliding_window=None)),
    "olmo2": Tiny(_config("Olmo2Config")),
    "gpt-neox": Tiny(_config("GPTNeoXConfig", rotary_pct=0.25, num_key_value_heads=4)),
    "qwen3-moe": Tiny(
        _config(
            "Qwen3MoeConfig",
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
        )
    ),
}


def build(config: PretrainedConfig) -> PreTrainedModel:
    """The model with large random weights, the same at every call."""
    torch.manual_seed(7)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=2.0 / weight.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
        else:
            weight.data.add_(torch.randn_like(weight) * 0.2)
    return module.eval()


def save(config: PretrainedConfig, folder: Path) -> Path:
    """A checkpoint folder of the tiny model."""
    build(config).save_pretrained(folder)
    return folder
