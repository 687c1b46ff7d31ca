"""Load a checkpoint folder as a `Model`, on the fastest path that gives the right logits.

Architectures that can't be served are refused, by their configuration before loading and by a probe
after it.
"""

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from memserve.errors import ModelNotFound, UnsupportedModel
from memserve.model.attention.native import load_kernels
from memserve.model.attention.paged import PagedAttention
from memserve.model.fused import FusedDecoder, can_fuse
from memserve.model.linear import choose_linears
from memserve.model.model import Model, Transformer
from memserve.model.probe import disagreement, eager_logits, probe_sequences
from memserve.model.rotary import fix_longrope
from memserve.model.support import check_config, layer_windows, model_spec
from memserve.pool.refs import DType

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    folder: Path, *, device: str, dtype: DType, max_model_len: int | None, block_size: int
) -> Model:
    """Load the Hugging Face checkpoint in `folder` and check that it computes what it should.

    `max_model_len` None: as long as the configuration allows. `block_size` is the arena's, for the
    check. Raises `ModelNotFound` if there is no checkpoint, `UnsupportedModel` with the reason if
    this engine can't serve it.
    """
    if device != "cpu":
        raise UnsupportedModel(f"device {device} isn't supported yet, only cpu")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"{dtype} isn't supported on the CPU, only {' and '.join(DTYPES)}")
    config = _read_config(folder)
    check_config(config)
    module = _load_module(folder, config, DTYPES[dtype])
    spec = model_spec(
        config,
        architecture=type(module).__name__,
        dtype=dtype,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(module),
    )
    fix_longrope(module, spec.max_model_len)
    sequences = probe_sequences(spec)
    expected = eager_logits(module, sequences)
    windows = layer_windows(config.get_text_config())
    kernels = load_kernels()
    linears = choose_linears(kernels, DTYPES[dtype])
    attention = PagedAttention(kernels, num_query_heads=spec.num_query_heads, windows=windows)
    if kernels is not None and can_fuse(module):
        model = Model(spec, FusedDecoder(module, kernels, linears, windows), attention)
        problem = disagreement(model, sequences, expected, block_size)
        if problem is None:
            log.info("%s runs fused, attention %s", spec.architecture, attention.name)
            return model
        log.warning("the fused path can't serve %s, transformers' own will: %s", folder, problem)
        module = _load_module(folder, config, DTYPES[dtype])
        fix_longrope(module, spec.max_model_len)
    model = Model(spec, Transformer(module, linears), attention)
    problem = disagreement(model, sequences, expected, block_size)
    if problem is not None:
        raise UnsupportedModel(f"{config.model_type}: {problem}")
    log.info("%s runs by transformers, attention %s", spec.architecture, attention.name)
    return model


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} holds no Hugging Face checkpoint (no config.json)")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModel(f"{folder}: {error}") from error


def _load_module(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    disable_progress_bar()
    try:
        module = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    except OSError as error:
        raise ModelNotFound(f"{folder}: {error}") from error
    return module.eval()


def _eos_token_ids(module: PreTrainedModel) -> list[int]:
    generation = module.generation_config
    chosen = None if generation is None else generation.eos_token_id
    if chosen is None:
        chosen = module.config.get_text_config().eos_token_id
    if chosen is None:
        return []
    return list(chosen) if isinstance(chosen, list) else [chosen]
