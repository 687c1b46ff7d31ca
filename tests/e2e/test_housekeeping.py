"""Starting and ending: nothing is left behind, mistakes are one line and exit code 2."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.servers import SMALL, children, serve, shared_memory_files, wait_until_gone


def refused(*arguments: str) -> str:
    """Standard error of a `memserve serve` that must refuse to start."""
    run = subprocess.run(
        [sys.executable, "-m", "memserve", "serve", *arguments],
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 2, run.stderr.decode()
    assert b"Traceback" not in run.stderr
    return run.stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything(number: signal.Signals, log: Path) -> None:
    before = shared_memory_files()
    with serve(*SMALL, log=log) as server:
        workers = server.workers()
        assert len(workers) == 2
        assert server.stop(number) == 0
        wait_until_gone(workers)
    assert shared_memory_files() == before


def test_workers_leave_when_the_launcher_is_killed(log: Path) -> None:
    before = shared_memory_files()
    with serve(*SMALL, log=log) as server:
        workers = server.workers()
        server.process.kill()
        wait_until_gone(workers)
    assert shared_memory_files() == before


def test_a_busy_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("--port", str(port)).splitlines()[-1]


def test_a_missing_model_is_one_clear_line() -> None:
    assert "/nowhere/at/all" in refused("/nowhere/at/all").splitlines()[-1]


def test_too_little_memory_is_one_clear_line() -> None:
    line = refused("--kv-cache-memory", "90T", "--port", "0").splitlines()[-1]
    assert "--kv-cache-memory" in line


def test_a_worker_that_can_not_start_ends_the_others(log: Path) -> None:
    command = [sys.executable, "-m", "memserve", "serve", "--kv-cache-memory", "90T", "--port", "0"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as run:
        workers: set[int] = set()
        while run.poll() is None:
            workers |= set(children(run.pid))
            time.sleep(0.05)
    assert workers
    wait_until_gone(list(workers))


def test_nobody_to_decode_is_refused() -> None:
    assert "--decode" in refused("--prefill", "2")


def test_an_unknown_flag_in_the_configuration_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "memserve.yaml"
    file.write_text("max-num-sequences: 3\n")
    assert "max_num_sequences" in refused("--config", str(file))
