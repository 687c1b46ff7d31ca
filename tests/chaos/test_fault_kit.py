"""The fault kit on real worker processes with a real model; and nothing of it is in the product.

Here are the scenarios for which real processes and a real model add something: A3 and C1.
"""

import ast
import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest

from memserve.cluster.cluster import Cluster
from memserve.config import EngineConfig, ServeConfig
from memserve.launcher import plan_instances
from memserve.messages import ToLauncher, ToWorker
from memserve.model.prepared import PreparedModel
from memserve.scheduler.scheduler import Scheduler
from tests.faults.plan import Action, Fault
from tests.faults.processes import FaultyProcesses, faulty_processes
from tests.workers.rig import PLAIN, answer, assert_all_home, generation

PACKAGE = Path(__file__).parents[2] / "memserve"
PREFILL, DECODE = 0, 1


@asynccontextmanager
async def real_workers(model: PreparedModel) -> AsyncIterator[tuple[Cluster, FaultyProcesses]]:
    """One prefill and one decode worker, as processes, in float32."""
    config = ServeConfig(
        prefill=1, decode=1, dtype="float32", kv_cache_memory="128M", max_model_len=512
    )
    async with faulty_processes() as processes:
        cluster = Cluster(
            plan_instances(config, model),
            Scheduler(replace(PLAIN, block_size=config.block_size, max_num_batched_tokens=512)),
            max_num_queued_reqs=100,
            spawn=processes.spawn,
        )
        async with cluster.running():
            yield cluster, processes


async def greedy(cluster: Cluster, number: int, prompt: list[int]) -> list[int]:
    async with asyncio.timeout(60):
        (got,) = await answer(cluster, generation(number, prompt, 12, greedy=True))
    return got


async def both_late(cluster: Cluster) -> None:
    """Return when the copy that was held and the one behind it have ended."""
    async with asyncio.timeout(60):
        while (await cluster.inspect())[DECODE].inspection.stats.num_late_copies < 2:
            await asyncio.sleep(0.05)


async def test_a3_c1_real_copies_that_are_held_torn_and_late_leave_every_token_as_it_was(
    demo_model: PreparedModel,
) -> None:
    first, second, third = ([20 * n + i % 90 for i in range(90)] for n in range(1, 4))
    async with real_workers(demo_model) as (cluster, processes):
        clean = {n: await greedy(cluster, n, prompt) for n, prompt in enumerate((second, third))}
        cluster.reset_prefix_cache()
        decode = processes.started[DECODE]
        await decode.arm(Fault(at="handover", action=Action.HOLD))
        async with cluster.generate(generation(10, first, 50, greedy=True)):
            await decode.wait_for("handover")
        held = (await cluster.inspect())[DECODE].inspection.stats.hbm
        assert held is not None
        assert held.in_flight > 0
        # Its client has gone, its copy has not: others compute and wait behind it.
        assert await greedy(cluster, 11, second) == clean[0]
        await decode.release()
        await both_late(cluster)  # else the fault would meet the one that waited behind
        await decode.arm(Fault(at="handover", action=Action.TEAR))
        assert await greedy(cluster, 12, third) == clean[1]
        await assert_all_home(cluster)
        stats = (await cluster.inspect())[DECODE].inspection.stats
        assert (stats.num_failed_pulls, stats.num_late_copies) == (1, 2)
        # A life ends at the moment that hurts most: while it copies.
        await decode.arm(Fault(at="handover", action=Action.KILL))
        cluster.reset_prefix_cache()
        assert await greedy(cluster, 13, second) == clean[0]
        assert cluster.recoveries.num_deaths == 1
        async with asyncio.timeout(60):
            while cluster.down():
                await asyncio.sleep(0.05)
        assert [instance.epoch for instance in cluster.instances] == [1, 2]
        assert await greedy(cluster, 14, third) == clean[1]
        await assert_all_home(cluster)


def test_the_package_can_not_load_the_kit() -> None:
    """Every import in it has a fixed name, none is the kit's, and only `config` reads variables."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names):
                    imported = [alias.name for alias in names]
                case ast.ImportFrom(module=str(module)):
                    imported = [module]
                case ast.Call(func=ast.Name(id=("__import__" | "exec" | "eval"))):
                    pytest.fail(f"{path} runs what it is told")
                case ast.Call(func=ast.Attribute(attr=("import_module" | "run_module"))):
                    pytest.fail(f"{path} imports what it is told")
                case _:
                    continue
            assert not any(name.split(".")[0] == "tests" for name in imported), path


def test_no_flag_field_or_message_speaks_of_faults() -> None:
    names = [each.name for each in fields(ServeConfig)]
    for struct in (EngineConfig, *get_args(ToWorker), *get_args(ToLauncher)):
        names += [struct.__name__, *struct.__struct_fields__]
    assert not [name for name in names if "fault" in name.lower() or "inject" in name.lower()]


def test_a_production_worker_takes_no_plan_of_faults() -> None:
    arguments = ["0", "1", str(os.getpid()), "0", "plan.json"]
    command = [sys.executable, "-m", "memserve.workers.entry", *arguments]
    run = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert run.returncode != 0
    assert b"ValueError: invalid literal" in run.stderr  # all further arguments are cores
