"""`memserve bench`: flags and printing; the work is done in `memserve.bench.serve`."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

# What needs numpy or aiohttp is imported when the command runs: `memserve serve` loads this module.


@click.group()
def bench() -> None:
    """Benchmark a running server."""


@bench.command("serve")
@click.option("--base-url", default=None, help="Server's URL; wins over --host and --port.")
@click.option("--host", default="127.0.0.1", help="Server's host.")
@click.option("--port", default=8000, help="Server's port.")
@click.option(
    "--endpoint",
    default="/v1/completions",
    help="/v1/completions takes token ids; an API that ends in /chat/completions takes text.",
)
@click.option("--model", default=None, help="Model name [default: the server's first].")
@click.option(
    "--api-key", envvar=["MEMSERVE_API_KEY", "OPENAI_API_KEY"], default=None, help="Key to send."
)
@click.option(
    "--dataset-name",
    default="random",
    help="sharegpt, loogle, react, shared-documents, prefix-repetition, random or timed-trace.",
)
@click.option(
    "--dataset-path",
    type=click.Path(path_type=Path),
    default=None,
    help="sharegpt: turn lengths of real chats; loogle: documents; timed-trace: the trace.",
)
@click.option("--num-prompts", default=100, help="Requests, over all sessions.")
@click.option(
    "--request-rate", default=float("inf"), help="Sessions that start in a second; inf: at once."
)
@click.option("--burstiness", default=1.0, help="Shape of the gaps' gamma distribution.")
@click.option("--max-concurrency", default=None, type=int, help="Most requests at once.")
@click.option("--think-time", default=0.0, help="Mean seconds between an answer and the next turn.")
@click.option("--seed", default=0, help="Of everything drawn.")
@click.option("--scale", default=1.0, help="Factor of every drawn length.")
@click.option("--max-input-len", default=None, type=int, help="Longest prompt in tokens.")
@click.option("--max-output-len", default=None, type=int, help="Longest answer in tokens.")
@click.option(
    "--max-model-len", default=None, type=int, help="Longest sum of both [default: the model's]."
)
@click.option(
    "--vocab-range", default=(1000, 30_000), type=(int, int), help="Token ids: first, end."
)
@click.option("--random-input-len", default=1024, help="random: new prompt tokens.")
@click.option("--random-output-len", default=128, help="random: answer tokens.")
@click.option("--random-range-ratio", default=0.0, help="random: lengths vary by this share.")
@click.option("--random-prefix-len", default=0, help="random: tokens shared by all.")
@click.option("--prefix-repetition-prefix-len", default=256, help="Tokens of each prefix.")
@click.option("--prefix-repetition-suffix-len", default=256, help="Tokens after the prefix.")
@click.option("--prefix-repetition-num-prefixes", default=10, help="Number of prefixes.")
@click.option("--prefix-repetition-output-len", default=128, help="Answer tokens.")
@click.option(
    "--num-shared", default=2, help="shared-documents: sessions that ask about each document."
)
@click.option("--trace-speedup", default=1.0, help="timed-trace: how much faster than recorded.")
@click.option(
    "--ignore-eos/--no-ignore-eos", default=True, help="Force the drawn lengths of answers."
)
@click.option("--temperature", default=0.0, help="0 is greedy.")
@click.option("--extra-body", default="{}", help="JSON object of more fields for every request.")
@click.option("--num-warmups", default=1, help="Requests before the clock starts.")
@click.option("--request-timeout", default=600.0, help="Seconds for one request.")
@click.option(
    "--goodput",
    multiple=True,
    help="Limit in ms, as ttft:500; of ttft, tpot, itl, e2el; repeatable, or split by commas.",
)
@click.option("--percentile-metrics", default="ttft,tpot,itl,e2el", help="Latencies to show.")
@click.option("--metric-percentiles", default="99", help="Percentiles to show, split by commas.")
@click.option("--disable-tqdm", is_flag=True, help="Show no progress.")
@click.option("--save-result", is_flag=True, help="Write a JSON file.")
@click.option("--save-detailed", is_flag=True, help="Also every request; implies --save-result.")
@click.option(
    "--result-dir", type=click.Path(path_type=Path), default=Path(), help="Folder of the file."
)
@click.option("--result-filename", default=None, help="Its name [default: tells rate and model].")
@click.option("--label", default=None, help="Name of the run in the result.")
def serve(**values: Any) -> None:  # noqa: ANN401
    """Send a workload to an OpenAI-compatible server and report latency, throughput and hit rate.

    Sessions start at the request rate; each turn waits for the answer to the one before. Exit status
    1 if any request failed.
    """
    from memserve.bench.flags import make_options, parse_metrics
    from memserve.bench.lines import result_lines
    from memserve.bench.progress import LoadProgress
    from memserve.bench.results import as_json, write_json
    from memserve.bench.serve import bench_serve

    options = make_options(values)
    metrics = parse_metrics(values["percentile_metrics"])
    shown = not values["disable_tqdm"]
    progress = LoadProgress(sys.stderr, options.workload.num_requests) if shown else None
    try:
        result, record = asyncio.run(bench_serve(options, progress or (lambda _: None)))
    finally:
        if progress:
            progress.close()
    for text in result_lines(result, metrics):
        click.echo(text)
    if values["save_result"] or values["save_detailed"]:
        body = as_json(result, record if values["save_detailed"] else None)
        path = write_json(values["result_dir"], values["result_filename"], result.setup, body)
        click.echo(f"result: {path}")
    if result.failed or result.skipped:
        sys.exit(1)
