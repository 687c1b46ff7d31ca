"""Ranks of a group are killed and stopped in the middle of a prompt, on a real server."""

import asyncio
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import FLAGS
from tests.chaos.test_deaths import Answer, pid, stream, wait_until_healthy
from tests.e2e.servers import ServerProcess, assert_all_home, serve

LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 230
NUM_TOKENS = 24


@pytest.fixture
def grouped(tmp_path: Path) -> Iterator[ServerProcess]:
    """Two workers, neither of which has room for the long prompt."""
    flags = ("--mixed", "2", "--max-sp", "0", "--kv-cache-memory", "80M")
    with serve(*FLAGS, *flags, log=tmp_path / "log") as server:
        yield server


def count(server: ServerProcess, name: str) -> float:
    """The sum of a counter over its labels."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=10) as response:
        text = response.read().decode()
    return sum(
        float(value)
        for value in re.findall(rf"^memserve:{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
    )


async def answers(server: ServerProcess, disturb: int | None = None) -> list[Answer]:
    """A long prompt and a short one; `disturb` sends this signal to a rank in its middle."""
    started = await asyncio.to_thread(count, server, "groups_started")
    async with server.async_client() as client:
        long = asyncio.create_task(
            stream(client, Answer(1), LONG_PROMPT + "Then", seed=None, num_tokens=NUM_TOKENS)
        )
        async with asyncio.timeout(100):
            while await asyncio.to_thread(count, server, "groups_started") == started:
                await asyncio.sleep(0.02)
        short = asyncio.create_task(
            stream(client, Answer(1), "Once upon a time", seed=None, num_tokens=NUM_TOKENS)
        )
        if disturb is not None:
            os.kill(pid(server, 1), disturb)
        return [await long, await short]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_rank_that_dies_or_hangs_in_the_middle_costs_no_answer(
    grouped: ServerProcess, number: int
) -> None:
    undisturbed = await answers(grouped)
    assert await asyncio.to_thread(count, grouped, "groups_dissolved") == 0
    async with asyncio.timeout(10):  # till the worker tells of it
        while not await asyncio.to_thread(count, grouped, "remote_decode_tokens"):
            await asyncio.sleep(0.1)
    grouped.post("/reset_prefix_cache", {})
    for answer, wanted in zip(await answers(grouped, number), undisturbed, strict=True):
        answer.assert_same(wanted)
    assert await asyncio.to_thread(count, grouped, "groups_dissolved") >= 1
    await wait_until_healthy(grouped, 1, 2)
    assert await asyncio.to_thread(count, grouped, "worker_deaths") == 1
    grouped.post("/reset_prefix_cache", {})
    for answer, wanted in zip(await answers(grouped), undisturbed, strict=True):
        answer.assert_same(wanted)
    grouped.post("/reset_prefix_cache", {})
    assert_all_home(grouped)
