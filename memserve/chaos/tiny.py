"""A model so small that the server and not its arithmetic sets the pace: random weights, real words.

Tokenizer and chat template are those of another model. What it says means nothing, but every token
depends on all before it, as in any model, so a wrong block of KV changes the answer.
"""

import json
import shutil
from pathlib import Path

from memserve.model.prepared import CHAT_TEMPLATE, PreparedModel

WEIGHT_SCALE = 2.0
"""Of each weight matrix times the root of its width: distant context matters to every token."""


def make_tiny(
    folder: Path, like: PreparedModel, max_model_len: int, *, num_kv_heads: int = 2
) -> Path:
    """A checkpoint in `folder`, with the vocabulary of `like`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=like.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_model_len,
        bos_token_id=like.bos_token_id,
        eos_token_id=list(like.eos_token_ids),
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    module = AutoModelForCausalLM.from_config(config)
    for weight in module.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=WEIGHT_SCALE / weight.shape[-1] ** 0.5)
    module.save_pretrained(folder)
    shutil.copy(like.tokenizer_file, folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **like.special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = like.chat_template()
    assert template is not None
    (folder / CHAT_TEMPLATE).write_text(template)
    return folder
