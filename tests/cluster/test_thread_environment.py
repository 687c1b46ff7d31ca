"""A worker's threads stay on cores of their own, whatever else runs there."""

import os
import subprocess
import sys

import pytest

from memserve.machine import thread_environment, usable_cores

CORES_OF_THREADS = """
import os, torch
torch.ones(4_000_000).add_(1)
tasks = {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}
print(sorted(min(cores) for cores in tasks.values() if len(cores) == 1))
"""


def test_a_single_thread_is_not_bound_twice() -> None:
    assert "OMP_PROC_BIND" not in thread_environment([3])


@pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")
def test_every_thread_has_a_core_of_its_own() -> None:
    cores = usable_cores()[:2]
    command = [sys.executable, "-c", CORES_OF_THREADS]
    environment = os.environ | thread_environment(cores)
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(cores)
