"""What processes have died of, told by how the kernel says they ended."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from memserve import machine
from memserve.cluster.causes import died_of_itself, state

SLEEPS = "import time; time.sleep(60)"


async def run(program: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", program)


@pytest.mark.parametrize(
    "program",
    ["import os; os.abort()", "import os; os.kill(os.getpid(), 11)", "raise SystemExit(3)", "0"],
    ids=["abort", "segmentation fault", "exit status", "it left"],
)
async def test_what_a_process_does_to_itself_is_its_own_doing(program: str) -> None:
    process = await run(program)
    await process.wait()
    assert died_of_itself(process, machine.num_memory_kills())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_kill_from_outside_is_not(number: signal.Signals) -> None:
    process = await run(SLEEPS)
    process.send_signal(number)
    await process.wait()
    assert not died_of_itself(process, machine.num_memory_kills())


async def test_a_kill_for_want_of_memory_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 3\nmax 7\noom 2\noom_kill 2\noom_group_kill 0\n")
    assert machine.num_memory_kills() == 2
    process = await run(SLEEPS)
    process.kill()
    await process.wait()
    assert not died_of_itself(process, 2)
    events.write_text("oom_kill 3\n")
    assert died_of_itself(process, 2)


def test_without_a_control_group_the_kernel_as_a_whole_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine, "VMSTAT", tmp_path / "vmstat")
    assert machine.num_memory_kills() == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 4\n")
    assert machine.num_memory_kills() == 4


async def test_one_that_is_stopped_does_not_hang_of_itself_and_one_that_runs_does() -> None:
    process = await run(SLEEPS)
    try:
        assert died_of_itself(process, 0)
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(10):
            while state(process.pid) != "T":
                await asyncio.sleep(0.005)
        assert not died_of_itself(process, 0)
    finally:
        process.kill()
        await process.wait()
    assert state(os.getpid()) == "R"
