"""The Triton kernels without a GPU: what they compute, in the interpreter, and that they compile.

The interpreter must be on when Triton is first imported, and changes it for the whole process, so
its tests (`tests/model/interpreted`) run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the extra `test` brings Triton to Linux")

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["test_attention", "test_layers", "test_model"])
def test_the_kernels_compute_what_they_should_in_the_interpreter(name: str) -> None:
    tests = HERE / "interpreted" / f"{name}.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
