"""What the rest of memserve needs to know of a loaded model. Values only, no torch."""

import msgspec

from memserve.pool.refs import DType


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and limits of a model; decides the layout of the arenas that can hold its KV."""

    architecture: str
    """Class name in transformers, e.g. `LlamaForCausalLM`."""
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    """Tokens a sequence may have, prompt and answer together."""
    dtype: DType
    """Of weights and KV."""
    eos_token_ids: tuple[int, ...]
