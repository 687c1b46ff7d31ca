"""Makes a model ready to serve; runs as a child process of the launcher.

    python -m memserve.model.prepare --cache FOLDER [-- MODEL]

writes `Report`s to standard output, a JSON line each, the last of them `Finished` or `Refused`; all
else that any library prints goes to standard error. The tokenizer that it writes is the one that
`AutoTokenizer` builds, and it is compared with it on sample texts before anything is kept.

One process at a time prepares a model; the others wait and find it done. What a killed one left is
removed by the next.
"""

import argparse
import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from memserve.errors import InvalidRequest, UnsupportedModel, UsageError
from memserve.model.prepared import (
    CHAT_TEMPLATE,
    RECORD,
    TOOL_TEMPLATE,
    Finished,
    PreparedModel,
    Progress,
    Refused,
    Report,
    ReportProgress,
    find_prepared,
    fingerprint,
    parse_source,
    source_key,
)
from memserve.model.sources import complete_folder, obtain_weights
from memserve.tokens import Tokenizer

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces, one trailing tab\t",
    "a\n 42 and  17\t 3,\n\n  5",
    "In 1999, 12345 people paid $3.14 (or 2,71 €) at 10:30; 0x7f, ½ and ٣.",
    "line one\nline two\r\n\n\n   indented   \n",
    "def f(x: int) -> str:\n    return f'{x!r}'  # don't, I'll, we've\n",
    "Grüße aus Köln, ça va? Съешь ещё этих булок. 日本語のテキスト。 한국어 हिन्दी العربية",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and e\u0301 combining, zero\u200bwidth, nbsp\u00a0here",
    "<|im_start|>user\nhi<|im_end|><s></s><bos><eos><|endoftext|>[INST]",
    "https://example.org/a_b?c=d&e=%20#f AAAAAAAAAAAAAAAA =====//-----",
    "",
    " ",
)
SAMPLE_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Are you sure?"},
]


def prepare(source: str | None, *, cache: Path, progress: ReportProgress) -> PreparedModel:
    """The prepared model of `source` (see `memserve.model.prepared`), made if it isn't there.

    Raises `ModelNotFound`, `UnsupportedModel` or `UsageError`; then nothing is left half made.
    """
    place = parse_source(source)
    if found := find_prepared(place, cache):
        return found
    key = source_key(place)
    with _one_at_a_time(cache / "locks" / key, progress):
        if found := find_prepared(place, cache):
            return found
        weights = obtain_weights(place, cache, progress)
        progress(Progress("Preparing the tokenizer"))
        final = cache / "prepared" / key
        with complete_folder(final) as folder:
            return _write_prepared(place.name, weights, folder, final)


@contextlib.contextmanager
def _one_at_a_time(lock: Path, progress: ReportProgress) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Progress("Waiting for another process that prepares this model"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write_prepared(name: str, weights: Path, folder: Path, final: Path) -> PreparedModel:
    config, reference = _load_reference(weights)
    backend = reference.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(folder / "tokenizer.json"))
    _write_templates(reference.chat_template, folder)
    text_config = config.get_text_config(decoder=True)
    prepared = PreparedModel(
        name=name,
        folder=str(folder),
        weights=str(weights),
        weights_fingerprint=fingerprint(weights),
        vocab_size=text_config.vocab_size,
        max_model_len=_max_model_len(text_config, reference),
        eos_token_ids=_eos_token_ids(weights, reference),
        bos_token_id=reference.bos_token_id,
        adds_bos=reference.bos_token_id is not None
        and reference("a").input_ids[:1] == [reference.bos_token_id],
        special_tokens={
            name: str(token)
            for name, token in reference.special_tokens_map.items()
            if isinstance(token, str)
        },
    )
    verify(Tokenizer(prepared), reference)
    prepared = msgspec.structs.replace(prepared, folder=str(final))
    (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(prepared)))
    return prepared


def _load_reference(weights: Path) -> tuple[Any, Any]:
    """The checkpoint's configuration and its tokenizer as transformers builds it."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"transformers can't read {weights}/config.json: {reason}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            weights, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(f"{weights} has no usable tokenizer: {reason}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnsupportedModel(
            f"{weights} has only a slow tokenizer ({type(tokenizer).__name__}); "
            "memserve needs one that can be saved as tokenizer.json"
        )
    return config, tokenizer


def _write_templates(templates: str | dict[str, str] | None, folder: Path) -> None:
    if templates is None:
        return
    named = {"default": templates} if isinstance(templates, str) else templates
    for name, file in (("default", CHAT_TEMPLATE), ("tool_use", TOOL_TEMPLATE)):
        if name in named:
            (folder / file).write_text(named[name], encoding="utf-8")


def _max_model_len(text_config: Any, reference: Any) -> int:  # noqa: ANN401
    """The configuration's limit; the tokenizer's where the configuration states none."""
    stated = getattr(text_config, "max_position_embeddings", None)
    limit = int(stated or reference.model_max_length)
    if limit > 1 << 30:  # transformers' stand-in for "unknown" is 1e30
        raise UnsupportedModel("neither config.json nor the tokenizer says how long a text may be")
    return limit


def _eos_token_ids(weights: Path, reference: Any) -> tuple[int, ...]:  # noqa: ANN401
    """What ends an answer, by the files themselves: a configuration class's default proves nothing."""
    ends: list[int | None] = [reference.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        file = weights / name
        if file.is_file():
            stated = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ends += stated if isinstance(stated, list) else [stated]
    return tuple(dict.fromkeys(int(token_id) for token_id in ends if token_id is not None))


def verify(tokenizer: Tokenizer, reference: Any) -> None:  # noqa: ANN401
    """Raise `UnsupportedModel` unless ids and rendered chats equal those of transformers' tokenizer."""
    for sample in SAMPLES:
        for special in (True, False):
            ours = tokenizer.encode(sample, add_special_tokens=special)
            theirs = reference(sample, add_special_tokens=special).input_ids
            if ours != theirs:
                raise UnsupportedModel(
                    f"the normalised tokenizer differs from transformers' on {sample!r}: "
                    f"{ours} instead of {theirs}"
                )
    if not tokenizer.has_chat_template:
        return
    try:
        rendered = tokenizer.render_chat(SAMPLE_CHAT)
    except InvalidRequest:
        return  # a template may demand tools, documents or other roles
    theirs = reference.apply_chat_template(SAMPLE_CHAT, tokenize=False, add_generation_prompt=True)
    if rendered != theirs:
        raise UnsupportedModel(f"the chat template renders {rendered!r} instead of {theirs!r}")


def main(arguments: list[str]) -> int:
    """Prepare, report, and return the exit status: 0, or 2 for a refusal."""
    parser = argparse.ArgumentParser(prog="python -m memserve.model.prepare")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("model", nargs="?")
    options = parser.parse_args(arguments)
    with os.fdopen(os.dup(1), "wb", buffering=0) as reports:
        os.dup2(2, 1)  # libraries print; only reports go to the launcher

        def send(report: Report) -> None:
            reports.write(msgspec.json.encode(report) + b"\n")

        try:
            send(Finished(prepare(options.model, cache=options.cache, progress=send)))
        except UsageError as error:
            send(Refused(type(error).__name__, str(error)))
            return 2
        except OSError as error:
            if error.errno is None:  # not the system's word, but a library's
                raise
            where = error.filename or options.cache
            send(Refused(UsageError.__name__, f"can't use {where}: {error.strerror}"))
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
