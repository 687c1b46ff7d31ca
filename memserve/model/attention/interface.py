"""The seam with transformers: an attention function that its models call in every layer.

The function finds the step's `Batch` in the keyword argument `memserve_batch`, which models
pass on untouched. Any other argument that could change the result is refused, not ignored.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from memserve.errors import UnsupportedModel
from memserve.model.attention.batch import Batch, rows_contiguous

IMPLEMENTATION = "memserve"

HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_router_logits"})
"""Arguments without influence on the result of paged causal attention."""


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,  # noqa: ANN401 (the signature is transformers')
) -> tuple[torch.Tensor, None]:
    """Write and attend one layer of a packed step.

    query [1, Hq, T, D], key and value [1, Hkv, T, D], rotated. Returns [1, T, Hq, D]. Raises
    `UnsupportedModel` for an argument that paged attention doesn't know.
    """
    batch: Batch | None = arguments.pop("memserve_batch", None)
    if batch is None:
        raise UnsupportedModel("the model doesn't pass keyword arguments on to its attention")
    scale = arguments.pop("scaling", None)
    window = arguments.pop("sliding_window", None)
    _refuse(attention_mask, arguments)
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise UnsupportedModel("the model doesn't number its attention layers")
    batch.check(layer, query, key, value)
    if window != batch.windows[layer]:
        raise UnsupportedModel(
            f"layer {layer} attends over a window of {window} tokens, but the model's "
            f"configuration says {batch.windows[layer]}"
        )
    tokens = rows_contiguous(query[0].transpose(0, 1)).flatten(1)
    batch.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = torch.empty_like(tokens)
    batch.attend(
        layer,
        tokens,
        output,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
    )
    return output.view(1, tokens.shape[0], *query.shape[1::2]), None


def _refuse(mask: torch.Tensor | None, arguments: dict[str, Any]) -> None:
    if mask is not None:
        raise UnsupportedModel("the model's attention needs a mask of its own")
    if arguments.pop("dropout", 0.0) or arguments.pop("is_causal", None) is False:
        raise UnsupportedModel("the model's attention isn't plain causal attention")
    for name, value in arguments.items():
        if value is not None and value is not False and name not in HARMLESS:
            raise UnsupportedModel(f"the model's attention takes `{name}`, which isn't supported")


def register() -> None:
    """Make the function known to transformers under `IMPLEMENTATION`; again is harmless."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)
