"""`memserve simulate` from the command line."""

import gzip
import json
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from memserve.cli import cli
from memserve.errors import UsageError
from memserve.sim.costs import builtin_profiles, load_profile

SMALL = ["simulate", "--num-requests", "12", "--rate", "0.5"]


def run(*arguments: str) -> tuple[list[str], dict[str, object]]:
    """The table's lines and the report."""
    result = CliRunner().invoke(cli, [*SMALL, *arguments], catch_exceptions=False)
    lines = result.output.strip().splitlines()
    return [line for line in lines if line.startswith("|")], json.loads(lines[-1])


def test_it_prints_a_line_for_each_rate_layout_and_policy() -> None:
    table, report = run("--rate", "0.5,1", "--layout", "2M,1P1D", "--policy", "cost,round-robin")
    assert len(table) == 2 + 2 * 2 * 2
    runs = report["runs"]
    assert isinstance(runs, list)
    assert [run["layout"] for run in runs[:4]] == ["2M", "2M", "1P1D", "1P1D"]


def test_instances_are_mixed_ones() -> None:
    _, report = run("--instances", "3")
    runs = report["runs"]
    assert isinstance(runs, list)
    assert runs[0]["layout"] == "3M"
    assert len(runs[0]["figures"]["utilisation"]) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layout", "2X"], "no layout"),
        (["--layout", "2D"], "needs instances that prefill"),
        (["--policy", "luck"], "no policy"),
        (["--rate", "fast"], "no list of numbers"),
        (["--rate", "-1"], "must be positive"),
        (["--plot", "picture.gif"], r"a \.png or a \.svg"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        run(*arguments)


def test_a_result_is_saved(tmp_path: Path) -> None:
    _, report = run("--save-result", str(tmp_path / "result.json"))
    assert json.loads((tmp_path / "result.json").read_text()) == report


def test_a_plot_is_drawn_where_there_is_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("plot.png", "plot.svg"):
        run("--rate", "0.5,1", "--plot", str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'memserve\[plot\]'"):
        run("--plot", str(tmp_path / "plot.png"))


def test_a_cost_model_of_ones_own_is_read(tmp_path: Path) -> None:
    profile = msgspec.structs.replace(builtin_profiles()["cpu-demo"], name="mine")
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(profile))
    assert load_profile(path) == profile
    _, report = run("--cost-model", str(path))
    assert report["profile"] == msgspec.to_builtins(profile)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": []}, "must take some time"),
        ({"copy_bandwidth": 0}, "copy_bandwidth"),
        ({"copy_bandwith": 1}, "unknown field"),
    ],
)
def test_a_cost_model_that_cannot_be_is_refused(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    values = msgspec.to_builtins(builtin_profiles()["cpu-demo"])
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**values, **change}))
    with pytest.raises(UsageError, match=sentence):
        load_profile(path)


def test_a_block_trace_is_played_with_its_shared_blocks(tmp_path: Path) -> None:
    records = [
        {
            "session": session,
            "turn": 0,
            "input_length": 40,
            "output_length": 10,
            "prompt_blocks": 2,
            "ids_rle": [[0, 2], [10 + session, 1]],
        }
        for session in range(4)
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    _, report = run("--trace", str(path), "--instances", "1", "--rate", "0.1")
    runs = report["runs"]
    assert isinstance(runs, list)
    assert runs[0]["figures"]["num_requests"] == 4
    assert runs[0]["figures"]["hit_rate"] == pytest.approx(3 * 32 / (4 * 40))


def test_a_timed_trace_is_played(tmp_path: Path) -> None:
    records = [
        {"timestamp": 3000 * i, "input_length": 600, "output_length": 5, "hash_ids": [0, i + 1]}
        for i in range(3)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    _, report = run("--trace", str(path), "--instances", "1", "--rate", "1")
    runs = report["runs"]
    assert isinstance(runs, list)
    assert runs[0]["figures"]["hit_rate"] == pytest.approx(2 * 512 / 1800)


def test_the_roofline_of_a_gpu_is_a_few_milliseconds_to_decode() -> None:
    profile = builtin_profiles()["h100-8b"]
    assert profile.step_seconds(0, 0, 1, 1000) == pytest.approx(8e-3, rel=0.05)
    assert profile.step_seconds(2048, 2048 * 1024, 0, 0) == pytest.approx(70e-3, rel=0.05)
