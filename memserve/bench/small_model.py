"""A small Llama of random weights, for benchmarks of what lies around the model.

A prompt of 1,700 tokens takes such a model some 50 ms of one core, a decode step two or three, so four
workers on two cores are loaded by a few requests a second. What it says means nothing. The
folder is a checkpoint as any other, made once in memserve's cache; no torch here.
"""

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from memserve.model.sources import complete_folder

NAME = "small-random-llama"
NUM_LAYERS, WIDTH, INNER, NUM_HEADS, NUM_KV_HEADS = 6, 256, 704, 8, 2
HEAD_DIM = WIDTH // NUM_HEADS
VOCAB_SIZE = 30_016
MAX_MODEL_LEN = 8192
END = "<|end|>"

Weights = dict[str, NDArray[np.float32]]


def small_model(cache: Path) -> Path:
    """The checkpoint's folder, made if it isn't there."""
    folder = cache / "bench" / NAME
    if not folder.exists():
        with complete_folder(folder) as partial:
            _write(partial)
    return folder


def _write(folder: Path) -> None:
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([END, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(settings))


def _weights() -> Weights:
    """By the names of transformers' Llama; the same at every call."""
    rng = np.random.default_rng(0)

    def drawn(num_outputs: int, num_inputs: int) -> NDArray[np.float32]:
        values = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32)
        return values / np.float32(num_inputs**0.5)

    ones = np.ones(WIDTH, np.float32)
    found: Weights = {
        "model.embed_tokens.weight": drawn(VOCAB_SIZE, WIDTH),
        "model.norm.weight": ones,
    }
    kv_width = NUM_KV_HEADS * HEAD_DIM
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "input_layernorm.weight": ones,
            prefix + "post_attention_layernorm.weight": ones,
            prefix + "self_attn.q_proj.weight": drawn(WIDTH, WIDTH),
            prefix + "self_attn.k_proj.weight": drawn(kv_width, WIDTH),
            prefix + "self_attn.v_proj.weight": drawn(kv_width, WIDTH),
            prefix + "self_attn.o_proj.weight": drawn(WIDTH, WIDTH),
            prefix + "mlp.gate_proj.weight": drawn(INNER, WIDTH),
            prefix + "mlp.up_proj.weight": drawn(INNER, WIDTH),
            prefix + "mlp.down_proj.weight": drawn(WIDTH, INNER),
        }
    return found
