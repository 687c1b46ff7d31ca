"""Servers that the tests of this folder share, and whose workers they kill."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.servers import SMALL, ServerProcess, serve

FLAGS = (*SMALL, "--dtype", "float32", "--worker-timeout", "4")


@pytest.fixture
def disaggregated(tmp_path: Path) -> Iterator[ServerProcess]:
    """One prefill and one decode worker."""
    with serve(*FLAGS, "--prefill", "1", "--decode", "1", log=tmp_path / "log") as server:
        yield server


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[ServerProcess]:
    """One worker that does everything."""
    with serve(*FLAGS, "--mixed", "1", log=tmp_path / "log") as server:
        yield server
