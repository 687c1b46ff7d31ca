"""What the rest of memserve needs to know of a loaded model. Values only, no torch."""

import msgspec

from memserve.pool.refs import ArenaLayout, DType, KVCacheDType


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
    """Of the weights, and of KV that nobody asked to be kept otherwise."""
    eos_token_ids: tuple[int, ...]

    def block_layout(self, block_size: int, kv_cache_dtype: KVCacheDType = "auto") -> ArenaLayout:
        """An arena of one block of the model's KV."""
        return ArenaLayout(
            num_blocks=1,
            num_layers=self.num_layers,
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype="float8_e4m3fn" if kv_cache_dtype == "fp8" else self.dtype,
        )
