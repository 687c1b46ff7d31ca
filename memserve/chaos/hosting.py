"""A server of our own for a run: the model it serves, and how it ends."""

import signal
import subprocess
import time
from pathlib import Path

from memserve.bench.variants import Started
from memserve.chaos.tiny import make_tiny
from memserve.model.prepared import PreparedModel, prepare_in_child
from memserve.paths import cache_dir

TINY = "tiny"
STOP_TIMEOUT_S = 60
GONE_TIMEOUT_S = 10


def prepared(
    model: str | None, folder: Path, max_model_len: int
) -> tuple[str | None, PreparedModel]:
    """What to serve, and what is known of it; `TINY` is made in `folder`. Raises `UsageError`."""
    source = model
    if source == TINY:
        like = prepare_in_child(None, cache=cache_dir())
        source = str(make_tiny(folder / TINY, like, max_model_len))
    return source, prepare_in_child(source, cache=cache_dir())


def stop(server: Started) -> list[str]:
    """End the server; what is wrong with how it ends."""
    workers = children(server.process.pid)
    server.process.send_signal(signal.SIGTERM)
    try:
        status = server.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return ["the server does not end"]
    wrong = [f"the server has ended with status {status}"] if status else []
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while (left := [pid for pid in workers if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return wrong + [f"worker process {pid} is still there" for pid in left]


def children(pid: int) -> list[int]:
    """Process ids of the direct children of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
