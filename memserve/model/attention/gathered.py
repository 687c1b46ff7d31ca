"""Attention in plain torch: gather a sequence's context from its blocks, then SDPA.

For chunks long enough that the matrix units pay for the copy, and for everything where the C++
kernel can't be compiled. Query heads are grouped with their KV head, so K and V are never repeated.
Buffers for the gathered context are kept: allocating them anew costs page faults at each call.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)


class ContextGatherer:
    """Copies a sequence's keys and values of one layer into kept, contiguous buffers."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def gather(
        self, arena: torch.Tensor, layer: int, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [len(blocks) * block_size, num_kv_heads, head_dim], valid until the next call."""
        buffers = self.buffers(arena, len(blocks))
        for which, buffer in enumerate(buffers):
            torch.index_select(arena[:, layer, which], 0, blocks, out=buffer)
        key, value = (buffer.flatten(0, 1) for buffer in buffers)
        return key, value

    def buffers(self, arena: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
        """Kept room for K and for V, [num_blocks, block_size, num_kv_heads, head_dim] each."""
        shape = arena.shape[3:]
        kept = self._buffers
        fits = bool(kept) and kept[0].shape[1:] == shape and kept[0].dtype == arena.dtype
        if not fits or len(kept[0]) < num_blocks:
            capacity = 1 << math.ceil(math.log2(num_blocks))
            kept[:] = [torch.empty(capacity, *shape, dtype=arena.dtype) for _ in range(2)]
        return [buffer[:num_blocks] for buffer in kept]


def visibility_mask(
    num_queries: int, kv_len: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Additive mask [num_queries, kv_len] for the last queries of a context; None: all visible."""
    if num_queries == 1 and (window is None or window >= kv_len):
        return None
    newest = torch.arange(kv_len - num_queries, kv_len)[:, None]
    context = torch.arange(kv_len)
    hidden = context > newest
    if window is not None:
        hidden |= context <= newest - window
    return torch.zeros(num_queries, kv_len, dtype=dtype).masked_fill_(hidden, -math.inf)


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """Attention of one sequence.

    query [T, Hq, D]; key, value [L, Hkv, D]; mask [T, L], additive, or None. `is_causal` replaces
    the mask where T == L (torch aligns it to the first key). Returns [T, Hq, D].
    """
    num_queries, num_heads, width = query.shape
    num_kv_heads = key.shape[1]
    keys, values = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    if num_queries > 1:
        queries = query.transpose(0, 1)[None]
        result = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if mask is None or is_causal else mask[None, None],
            is_causal=is_causal,
            scale=scale,
            enable_gqa=num_heads != num_kv_heads,
        )
        return result[0].transpose(0, 1)
    # One query: torch's own grouping is slow here, so the group takes the place of the queries.
    queries = query.view(1, num_kv_heads, num_heads // num_kv_heads, width)
    attn_mask = None if mask is None else mask[None, None]
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=attn_mask, scale=scale)
    return result.reshape(1, num_heads, width)
