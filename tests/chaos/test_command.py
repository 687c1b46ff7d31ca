"""`scripts/chaos` from its command line to its exit status."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memserve.chaos import command
from memserve.chaos.asking import CHAT, Asked
from memserve.chaos.command import parse_options
from memserve.chaos.judging import Difference
from memserve.chaos.performing import Performance
from memserve.chaos.report import Report, pauses_of, render
from memserve.chaos.run import Findings
from memserve.chaos.watching import Growth, Holding

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "chaos"
HOLDING = Holding(memory_mib=50.0, num_files=20, num_arenas=0)


def growth(line: float, quarters: tuple[float, float]) -> Growth:
    return Growth(what="files", mean=20.0, growth=line, quarters=quarters, tolerated=8.0)


def report(**changes: object) -> Report:
    values: dict[str, object] = {
        "model": "a model",
        "flags": [],
        "seed": 1,
        "minutes": 1.0,
        "requests": 10,
        "left": 1,
        "blows": {"kill": 2},
        "server": {"worker_deaths": 2.0, "convicted_requests": 0.0},
        "wrong": [],
        "ties": 1,
        "failed": [],
        "pauses": pauses_of([1.0, 3.0, 2.0]),
        "pages_leaked": 0,
        "audits": 5,
        "problems": [],
        "tracebacks": 0,
        "left_behind": [],
        "launcher": (HOLDING, HOLDING),
        "workers": ([HOLDING], [HOLDING]),
        "growths": [growth(1.0, (19.0, 20.0))],
    }
    return Report(**(values | changes))  # type: ignore[arg-type]


def test_a_run_without_complaint_has_no_violations() -> None:
    assert report().violations == []
    assert "P50 2.00 s" in render(report())
    assert render(report()).endswith("violations: none")


@pytest.mark.parametrize(
    "changes",
    [
        {"wrong": ["an answer"]},
        {"failed": ["a request"]},
        {"pages_leaked": 1},
        {"problems": ["a block"]},
        {"left_behind": ["a process"]},
        {"tracebacks": 1},
        {"workers": ([HOLDING], [Holding(memory_mib=50.0, num_files=23, num_arenas=0)])},
        {"server": {"convicted_requests": 1.0}},
        {"growths": [growth(9.0, (19.0, 20.0))]},
        {"growths": [growth(1.0, (10.0, 19.0))]},
    ],
)
def test_each_complaint_is_a_violation(changes: dict[str, object]) -> None:
    assert len(report(**changes).violations) == 1


def test_flags_of_the_server_replace_the_layout_and_not_what_a_comparison_needs() -> None:
    flags = parse_options(["--model", "tiny", "--", "--mixed", "2"]).flags
    assert "--prefill" not in flags
    assert flags[flags.index("--dtype") + 1] == "float32"
    with pytest.raises(SystemExit):
        parse_options(["--minutes", "0"])


def test_answers_that_differ_are_judged_while_the_tiny_model_is_still_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It lies in a folder that the run removes."""
    asked = Asked(kind="chat", endpoint=CHAT, body={"max_tokens": 4, "temperature": 0})
    different = Difference(asked=asked, prompt=[5, 6], choice=0, common=[], wanted=7, got=8)

    async def go(*_: object) -> Findings:
        holdings: list[tuple[Holding, list[Holding]]] = [(HOLDING, [])] * 2
        return Findings(performance=Performance(differences=[different]), holdings=holdings)

    @contextmanager
    def started(_name: str, _model: str, _flags: object, log_file: Path) -> Iterator[None]:
        log_file.touch()
        yield

    monkeypatch.setattr(command, "started", started)
    monkeypatch.setattr(command, "stop", lambda _: [])
    monkeypatch.setattr(command, "_go", go)
    (wrong,) = command.run(parse_options(["--model", "tiny"])).wrong
    assert "token 0 is 8, not 7, and no tie" in wrong


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_some_seconds_of_chaos_do_no_harm(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, SCRIPT, "--model", "tiny", "--minutes", "0.3", "--every", "4"),
            *("--samples-file", tmp_path / "samples"),
        ],
        capture_output=True,
        timeout=390,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode() + run.stdout.decode()
    found = json.loads(run.stdout.decode().splitlines()[-1])
    assert found["requests"] > 0
    assert found["server"]["worker_deaths"] >= found["blows"]["kill"] > 0
    assert found["wrong"] == found["failed"] == []
    samples = [json.loads(line) for line in (tmp_path / "samples").read_text().splitlines()]
    assert samples[0]["launcher"]["num_files"] > 0
    assert {worker["number"] for worker in samples[0]["workers"]} == {0, 1, 2}
