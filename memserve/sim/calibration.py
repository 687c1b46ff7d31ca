"""A profile from measurements: the JSON line of `scripts/bench_engine` becomes a step's linear form.

A worker's prefills and decode steps are fitted by non-negative least squares of relative errors. What
the report doesn't hold (copies, the sizes of KV cache and model) comes from a given profile.
"""

from pathlib import Path

import msgspec
import numpy as np

from memserve.errors import UsageError
from memserve.sim.costs import Profile, StepForm

ROUNDS = 20_000


class MeasuredPrefill(msgspec.Struct, frozen=True):
    """Of `memserve.bench.records.Prefill`."""

    prompt_tokens: int
    engine: float
    """Tokens per second."""


class MeasuredDecode(msgspec.Struct, frozen=True):
    """Of `memserve.bench.records.Decode`."""

    batch: int
    context: int
    engine: float
    """Milliseconds a step."""


class MeasuredWorker(msgspec.Struct, frozen=True):
    """Of `memserve.bench.records.Worker`."""

    num_threads: int
    prefill: list[MeasuredPrefill]
    decode: list[MeasuredDecode]


class EngineReport(msgspec.Struct, frozen=True):
    """Of `memserve.bench.records.Report`."""

    model: str
    max_num_batched_tokens: int
    workers: list[MeasuredWorker]


def calibrated(path: Path, num_threads: int, rest: Profile) -> Profile:
    """The profile of the report's worker with so many threads. Raises `UsageError` if there is none."""
    try:
        report = msgspec.json.decode(path.read_bytes().splitlines()[-1], type=EngineReport)
    except (OSError, IndexError, msgspec.DecodeError) as error:
        raise UsageError(f"can't read the engine's report {path}: {error}") from None
    for worker in report.workers:
        if worker.num_threads == num_threads:
            form = fit(worker, report.max_num_batched_tokens)
            return msgspec.structs.replace(
                rest,
                name=f"{report.model}, {num_threads} threads, measured",
                steps=[form],
                max_num_batched_tokens=report.max_num_batched_tokens,
            )
    known = ", ".join(str(worker.num_threads) for worker in report.workers)
    raise UsageError(f"{path} has no worker with {num_threads} threads: there are {known}")


def fit(worker: MeasuredWorker, chunk: int) -> StepForm:
    """The form that comes closest to what was measured."""
    rows = []
    for prefill in worker.prefill:
        tokens = prefill.prompt_tokens
        seconds = tokens / prefill.engine
        steps = -(-tokens // chunk)
        rows.append(np.array([steps, tokens, tokens * (tokens + 1) / 2, 0, 0]) / seconds)
    for decode in worker.decode:
        seconds = decode.engine / 1e3
        rows.append(np.array([1, 0, 0, decode.batch, decode.batch * decode.context]) / seconds)
    return StepForm(*_non_negative(np.array(rows)))


def _non_negative(rows: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> list[float]:
    """The x >= 0 that brings rows @ x closest to 1: multiplicative updates, which keep signs."""
    scales = rows.max(axis=0)
    used = scales > 0
    scaled = rows[:, used] / scales[used]
    gram, moments = scaled.T @ scaled, scaled.sum(axis=0)
    found = np.full(int(used.sum()), 1 / len(scales))
    for _ in range(ROUNDS):
        found *= moments / (gram @ found)
    solution = np.zeros(len(scales))
    solution[used] = found / scales[used]
    return [float(value) for value in solution]
