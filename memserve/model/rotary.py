"""Rotary embeddings whose frequencies depend on the length of a text.

`longrope` has one set of frequencies for short texts and one for long ones, and transformers
chooses by the longest position in the batch. Then a text's KV would depend on its neighbours and
change while it grows. Here `max_model_len` chooses, once.
"""

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from memserve.model.support import rotary_kinds


def fix_longrope(module: torch.nn.Module, max_model_len: int) -> None:
    """Make every `longrope` embedding in `module` use the frequencies for `max_model_len`."""
    for rotary in module.modules():
        if getattr(rotary, "rope_type", None) != "longrope":
            continue
        config = rotary.config
        assert isinstance(config, PretrainedConfig)
        ((_, parameters),) = rotary_kinds(config)
        if max_model_len <= int(str(parameters["original_max_position_embeddings"])):
            continue  # positions stay below the limit: always the short set
        buffer = rotary.inv_freq
        assert isinstance(buffer, torch.Tensor)
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
            config, buffer.device, seq_len=max_model_len
        )
        buffer.copy_(frequencies)
        rotary.original_inv_freq = buffer.clone()
