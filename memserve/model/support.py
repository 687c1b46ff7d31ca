"""Which models the engine can serve, read off their configuration before any weight is loaded.

What a configuration doesn't tell is found out by the probe (`memserve.model.probe`) after loading.
"""

from collections.abc import Sequence
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from memserve.errors import UnsupportedModel
from memserve.model.spec import ModelSpec
from memserve.pool.refs import DType

WINDOWED = "sliding_attention"
SERVED_LAYERS = frozenset({"full_attention", WINDOWED})
MAX_HEAD_DIM = 256


def check_config(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModel`, with the reason, if this architecture can't be served."""
    reason = _refusal(config, config.get_text_config())
    if reason is not None:
        raise UnsupportedModel(f"{config.model_type}: {reason}")


def _refusal(config: PretrainedConfig, text: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "encoder-decoder models aren't supported, only decoders"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    others = sorted(set(_field(text, "layer_types", ())) - SERVED_LAYERS)
    if others:
        return (
            f"layers of type {', '.join(others)} aren't supported, only full and sliding attention"
        )
    if model_class._is_stateful:  # noqa: SLF001 (transformers has no public name for it)
        return "recurrent layers keep a state that isn't KV, which isn't supported"
    if _field(text, "kv_lora_rank", None) is not None:
        return "multi-head latent attention (MLA) isn't supported"
    if not model_class._supports_attention_backend:  # noqa: SLF001
        return "its attention can't be replaced by a paged one"
    if _field(text, "attn_logit_softcapping", None) is not None:
        return "soft-capped attention scores aren't supported"
    if _field(text, "num_kv_shared_layers", 0):
        return "KV shared between layers isn't supported"
    return _shape_refusal(text) or _rotary_refusal(text)


def _shape_refusal(text: PretrainedConfig) -> str | None:
    heads = (text.num_attention_heads, _num_kv_heads(text), head_dim(text))
    if heads[0] % heads[1] != 0:
        return f"{heads[0]} query heads can't be shared out among {heads[1]} KV heads"
    if heads[2] % 8 != 0 or heads[2] > MAX_HEAD_DIM:
        return f"a head size of {heads[2]} isn't a multiple of 8 up to {MAX_HEAD_DIM}"
    return None


def _rotary_refusal(text: PretrainedConfig) -> str | None:
    if any(kind == "dynamic" for kind, _ in rotary_kinds(text)):
        return "dynamic rotary scaling depends on what else is in the batch, which isn't supported"
    return None


def rotary_kinds(text: PretrainedConfig) -> Sequence[tuple[str, dict[str, object]]]:
    """Type and parameters of each rotary embedding of the model."""
    parameters = _field(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return [(str(p.get("rope_type", "default")), p) for p in nested or [parameters]]


def layer_windows(text: PretrainedConfig) -> list[int | None]:
    """How many tokens a query of each layer sees, itself included; None: all before it."""
    window = _field(text, "sliding_window", None)
    kinds = _field(text, "layer_types", None)
    if kinds:
        return [window if kind == WINDOWED else None for kind in kinds]
    if _field(text, "use_sliding_window", True) is False:
        window = None
    return [window] * text.num_hidden_layers


def head_dim(text: PretrainedConfig) -> int:
    """Width of one attention head."""
    width: int | None = _field(text, "head_dim", None)
    return text.hidden_size // text.num_attention_heads if width is None else width


def model_spec(
    config: PretrainedConfig,
    *,
    architecture: str,
    dtype: DType,
    max_model_len: int | None,
    eos_token_ids: Sequence[int],
) -> ModelSpec:
    """The spec of a supported model. `max_model_len` None: what the configuration says."""
    text = config.get_text_config()
    longest = _field(text, "max_position_embeddings", None)
    if max_model_len is None and longest is None:
        raise UnsupportedModel("the configuration doesn't say how long a text may be: set a limit")
    if max_model_len is not None and longest is not None and max_model_len > longest:
        raise UnsupportedModel(f"the model's texts may have {longest} tokens, not {max_model_len}")
    return ModelSpec(
        architecture=architecture,
        num_layers=text.num_hidden_layers,
        num_query_heads=text.num_attention_heads,
        num_kv_heads=_num_kv_heads(text),
        head_dim=head_dim(text),
        vocab_size=text.vocab_size,
        max_model_len=max_model_len or longest,
        dtype=dtype,
        eos_token_ids=tuple(eos_token_ids),
    )


def _num_kv_heads(text: PretrainedConfig) -> int:
    count: int | None = _field(text, "num_key_value_heads", None)
    return text.num_attention_heads if count is None else count


def _field(config: PretrainedConfig, name: str, default: object) -> Any:  # noqa: ANN401
    """A field that not every configuration has, or has as None."""
    value = getattr(config, name, None)
    return default if value is None else value
