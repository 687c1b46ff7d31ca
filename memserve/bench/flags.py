"""The flags of `memserve bench serve` as options, checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from memserve.bench.results import METRICS, Metric
from memserve.bench.serve import ServeOptions
from memserve.errors import UsageError
from memserve.workloads import Limits, Workload
from memserve.workloads.synthetic import PrefixLengths, RandomLengths


def make_options(values: dict[str, Any]) -> ServeOptions:
    """The options that the flags ask for, keyed by their names. Raises `UsageError`."""
    name = str(values["dataset_name"]).replace("_", "-")
    path: Path | None = values["dataset_path"]
    own = name == "loogle"  # its file's texts need the server's tokenizer first
    return ServeOptions(
        base_url=values["base_url"] or f"http://{values['host']}:{values['port']}",
        workload=_workload(name, None if own else path, values),
        documents=path if own else None,
        endpoint=values["endpoint"],
        model=values["model"],
        api_key=values["api_key"],
        max_concurrency=values["max_concurrency"],
        ignore_eos=values["ignore_eos"],
        temperature=values["temperature"],
        num_warmups=values["num_warmups"],
        timeout=values["request_timeout"],
        extra_body=_parse_object(values["extra_body"]),
        percentiles=_parse_percentiles(values["metric_percentiles"]),
        goodput=_parse_goodput(values["goodput"]),
        label=values["label"],
    )


def _workload(name: str, path: Path | None, values: dict[str, Any]) -> Workload:
    first, end = values["vocab_range"]
    if not 0 <= first < end:
        raise UsageError(f"no token ids from {first} up to {end}")
    return Workload(
        name=name,
        num_requests=values["num_prompts"],
        rate=values["request_rate"],
        burstiness=values["burstiness"],
        think_time=values["think_time"],
        seed=values["seed"],
        path=path,
        limits=Limits(
            scale=values["scale"],
            max_input_len=values["max_input_len"],
            max_output_len=values["max_output_len"],
            max_model_len=values["max_model_len"],
        ),
        vocab=range(first, end),
        random=RandomLengths(
            input_len=values["random_input_len"],
            output_len=values["random_output_len"],
            range_ratio=values["random_range_ratio"],
            prefix_len=values["random_prefix_len"],
        ),
        prefixes=PrefixLengths(
            prefix_len=values["prefix_repetition_prefix_len"],
            suffix_len=values["prefix_repetition_suffix_len"],
            num_prefixes=values["prefix_repetition_num_prefixes"],
            output_len=values["prefix_repetition_output_len"],
        ),
        num_shared=values["num_shared"],
        speedup=values["trace_speedup"],
    )


def parse_metrics(text: str) -> list[Metric]:
    """The latencies named in a list split by commas. Raises `UsageError` for another name."""
    return [_metric(part) for part in text.split(",") if part.strip()]


def _metric(name: str) -> Metric:
    if (found := name.strip().lower()) not in METRICS:
        raise UsageError(f"no latency {name!r}: there are {', '.join(METRICS)}")
    return found


def _parse_percentiles(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"percentiles must be numbers, not {text!r}") from None
    if not all(0 <= share <= 100 for share in shares):
        raise UsageError(f"percentiles lie from 0 to 100, not {text!r}")
    return shares


def _parse_goodput(texts: Sequence[str]) -> dict[Metric, float]:
    limits: dict[Metric, float] = {}
    for part in " ".join(texts).replace(",", " ").split():
        name, _, limit = part.partition(":")
        try:
            limits[_metric(name)] = float(limit)
        except ValueError:
            raise UsageError(f"write a limit of goodput as ttft:500, not {part!r}") from None
    return limits


def _parse_object(text: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise UsageError(f"--extra-body must be a JSON object: {error}") from None
