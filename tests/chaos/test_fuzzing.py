"""`scripts/fuzz` from its command line to its exit status."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from memserve.chaos.fuzzing import Fuzzed, Pass, parse_options, render

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "fuzz"


def asked(statuses: dict[int, int], complaints: str = "") -> Pass:
    return Pass(name="clients", statuses=statuses, longest_s=0.5, complaints=complaints)


def fuzzed(**changes: object) -> Fuzzed:
    values: dict[str, object] = {
        "model": "a model",
        "flags": [],
        "seed": 1,
        "passes": [asked({200: 10, 400: 20, 503: 1, 504: 1})],
        "answers_afterwards": "",
        "pages_leaked": 0,
        "problems": [],
        "tracebacks": 0,
        "left_behind": [],
    }
    return Fuzzed(**(values | changes))  # type: ignore[arg-type]


def test_refusals_that_are_meant_are_no_violations() -> None:
    assert fuzzed().violations == []
    assert "10 × 200" in render(fuzzed())
    assert render(fuzzed()).endswith("violations: none")


@pytest.mark.parametrize(
    "changes",
    [
        {"passes": [asked({200: 10, 500: 1})]},
        {"passes": [asked({200: 10}, "a stream broke off")]},
        {"passes": [asked({400: 10})]},
        {"answers_afterwards": "connection: refused"},
        {"pages_leaked": 1},
        {"problems": ["a block"]},
        {"tracebacks": 1},
        {"left_behind": ["a process"]},
    ],
)
def test_each_complaint_is_a_violation(changes: dict[str, object]) -> None:
    assert len(fuzzed(**changes).violations) == 1


def test_nothing_is_drawn_without_examples() -> None:
    assert parse_options(["--", "--mixed", "2"]).flags[:2] == ("--mixed", "2")
    with pytest.raises(SystemExit):
        parse_options(["--max-examples", "0"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None,
    reason="needs schemathesis: pip install 'memserve[fuzz]'",
)
def test_a_real_server_gives_no_error_and_answers_afterwards() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT, "--max-examples", "3"],
        capture_output=True,
        timeout=590,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode() + run.stdout.decode()
    found = json.loads(run.stdout.decode().splitlines()[-1])
    assert [each["name"] for each in found["passes"]] == ["clients", "administration"]
    assert all(each["statuses"]["200"] > 0 for each in found["passes"])
