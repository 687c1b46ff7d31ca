"""Profiles from measured steps, and simulations against real runs."""

import json
from pathlib import Path

import pytest

from memserve.errors import UsageError
from memserve.sim.calibration import MeasuredDecode, MeasuredPrefill, MeasuredWorker, fit
from memserve.sim.costs import StepForm, builtin_profiles
from memserve.sim.dialogues import played
from memserve.sim.experiment import SimulateOptions, choose_profile, play
from memserve.sim.validation import read_run, render_validation, validate
from memserve.workloads import Workload, make_sessions

TRUE = StepForm(fixed=0.02, prefill_token=3e-4, prefill_pair=2e-8, decode=1.5e-3, decode_pair=5e-7)


def measured() -> MeasuredWorker:
    """What a worker with exactly these costs would show."""
    prefills = []
    for tokens in (256, 1024, 4096):
        steps = -(-tokens // 512)
        pairs = tokens * (tokens + 1) / 2
        seconds = steps * TRUE.fixed + tokens * TRUE.prefill_token + pairs * TRUE.prefill_pair
        prefills.append(MeasuredPrefill(tokens, tokens / seconds))
    decodes = [
        MeasuredDecode(b, c, 1e3 * (TRUE.fixed + b * TRUE.decode + b * c * TRUE.decode_pair))
        for b in (1, 8)
        for c in (256, 1024)
    ]
    return MeasuredWorker(1, prefills, decodes)


def test_a_form_is_found_again_from_what_it_gives() -> None:
    form = fit(measured(), 512)
    for found, true in zip(
        (form.fixed, form.prefill_token, form.decode),
        (TRUE.fixed, TRUE.prefill_token, TRUE.decode),
        strict=True,
    ):
        assert found == pytest.approx(true, rel=0.1)


def report_file(tmp_path: Path) -> Path:
    worker = measured()
    body = {
        "model": "demo",
        "max_num_batched_tokens": 512,
        "workers": [
            {
                "num_threads": 1,
                "prefill": [
                    {"prompt_tokens": p.prompt_tokens, "engine": p.engine} for p in worker.prefill
                ],
                "decode": [
                    {"batch": d.batch, "context": d.context, "engine": d.engine}
                    for d in worker.decode
                ],
            }
        ],
    }
    path = tmp_path / "engine.txt"
    path.write_text("a table\n\n" + json.dumps(body) + "\n")
    return path


def test_a_report_of_the_engine_becomes_a_profile(tmp_path: Path) -> None:
    profile = choose_profile(SimulateOptions(engine_report=report_file(tmp_path)))
    assert profile.step_seconds(0, 0, 8, 8 * 256) == pytest.approx(
        TRUE.fixed + 8 * TRUE.decode + 8 * 256 * TRUE.decode_pair, rel=0.02
    )
    with pytest.raises(UsageError, match="no worker with 3 threads"):
        choose_profile(SimulateOptions(engine_report=report_file(tmp_path), num_threads=3))


def saved_run(tmp_path: Path, **changes: object) -> Path:
    """A result as the load client saves it, in which everything took as long as simulated, twice."""
    workload = Workload(name="sharegpt", num_requests=20, rate=0.5, seed=4)
    figures = play(
        SimulateOptions(),
        builtin_profiles()["cpu-demo"],
        "2M",
        "least-load",
        played(make_sessions(workload)),
    )
    body: dict[str, object] = {
        "dataset_name": "sharegpt",
        "num_prompts": 20,
        "request_rate": 0.5,
        "burstiness": 1.0,
        "seed": 4,
        "scale": 1.0,
        "max_concurrency": None,
        "completed": 20,
        "total_input_tokens": figures.num_prompt_tokens,
        "mean_ttft_ms": figures.ttft_mean * 2e3,
        "mean_tpot_ms": figures.tpot_mean * 2e3,
        "mean_e2el_ms": figures.jct_mean * 2e3,
        "output_throughput": figures.output_tokens_per_s / 2,
        "cache_hit_rate": figures.hit_rate,
    }
    path = tmp_path / "real.json"
    path.write_text(json.dumps({**body, **changes}))
    return path


def test_the_error_of_a_simulation_is_stated(tmp_path: Path) -> None:
    profile = builtin_profiles()["cpu-demo"]
    real = read_run(saved_run(tmp_path))
    found = validate(real, SimulateOptions(), profile, "2M", "least-load")
    assert [round(one.error, 6) for one in found] == [-0.5, -0.5, -0.5, 1.0, 0.0]
    assert "-50.0%" in render_validation(found)


def test_another_workload_is_not_compared(tmp_path: Path) -> None:
    profile = builtin_profiles()["cpu-demo"]
    real = read_run(saved_run(tmp_path, seed=5))
    with pytest.raises(UsageError, match="not the same workload"):
        validate(real, SimulateOptions(), profile, "2M", "least-load")


def test_clients_that_wait_for_each_other_are_simulated_so(tmp_path: Path) -> None:
    profile = builtin_profiles()["cpu-demo"]
    real = read_run(saved_run(tmp_path, request_rate="inf", max_concurrency=1))
    one_by_one = validate(real, SimulateOptions(), profile, "1M", "least-load")
    real = read_run(saved_run(tmp_path, request_rate="inf"))
    at_once = validate(real, SimulateOptions(), profile, "1M", "least-load")
    assert one_by_one[2].simulated < 0.7 * at_once[2].simulated
