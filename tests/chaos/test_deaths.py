"""Workers of a real server are killed and stopped while OpenAI's client reads (scenarios B1 to B9).

In float32 every answer must be the one of an undisturbed run, token by token, with its
log-probabilities. At the end every block is home and the books are right.
"""

import asyncio
import os
import re
import signal
import time
import urllib.request
from typing import Any

import openai
import pytest

from tests.e2e.servers import ServerProcess, assert_all_home

MODEL = "SmolLM2-135M-Instruct"
PREFILL, DECODE = 0, 1
NUM_TOKENS = 40
LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 80


class Answer:
    """What has been streamed of one completion."""

    def __init__(self, num_choices: int) -> None:
        self.texts = [""] * num_choices
        self.tokens: list[list[int]] = [[] for _ in range(num_choices)]
        self.logprobs: list[list[float]] = [[] for _ in range(num_choices)]
        self.reasons: list[str | None] = [None] * num_choices
        self.cached = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def add(self, chunk: Any) -> None:
        for choice in chunk.choices:
            self.texts[choice.index] += choice.text
            self.tokens[choice.index] += choice.token_ids
            self.logprobs[choice.index] += choice.logprobs.token_logprobs
            self.reasons[choice.index] = choice.finish_reason or self.reasons[choice.index]

    def assert_same(self, other: "Answer") -> None:
        assert self.tokens == other.tokens
        assert self.texts == other.texts
        assert self.reasons == other.reasons
        for mine, theirs in zip(self.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


async def stream(
    client: openai.AsyncOpenAI, answer: Answer, prompt: str, *, seed: int | None, num_tokens: int
) -> Answer:
    """Greedy without a seed."""
    chunks = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=num_tokens,
        n=len(answer.texts),
        temperature=0 if seed is None else 0.9,
        seed=seed,
        logprobs=1,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True, "repetition_penalty": 1.1},
    )
    async for chunk in chunks:
        answer.add(chunk)
    return answer


REQUESTS: list[tuple[str, int | None, int]] = [
    ("Once upon a time", None, 1),
    ("A list of animals:", 7, 2),
    (LONG_PROMPT + "Then", None, 1),
]


async def run_all(server: ServerProcess, num_tokens: int, disturb: Any = None) -> list[Answer]:
    """All of REQUESTS at once, and what else is to happen meanwhile."""
    answers = [Answer(num_choices) for _, _, num_choices in REQUESTS]
    async with server.async_client() as client:
        running = [
            asyncio.create_task(stream(client, answer, prompt, seed=seed, num_tokens=num_tokens))
            for answer, (prompt, seed, _) in zip(answers, REQUESTS, strict=True)
        ]
        if disturb is not None:
            await disturb(answers)
        return await asyncio.gather(*running)


def pid(server: ServerProcess, number: int) -> int:
    """Process id of the instance, by the arguments that it was started with."""
    alive = sorted(server.workers())
    return alive[number]


async def wait_until_healthy(server: ServerProcess, *epochs: int) -> None:
    """Until every worker serves, in these lives."""
    deadline = time.monotonic() + 60
    while True:
        health = await asyncio.to_thread(server.get, "/health")
        instances = (await asyncio.to_thread(server.get, "/admin/instances"))["instances"]
        lives = [each["epoch"] for each in sorted(instances, key=lambda each: each["number"])]
        if health == {"status": "ok"} and lives == [*epochs]:
            return
        assert time.monotonic() < deadline, (health, instances)
        await asyncio.sleep(0.1)


async def until_all_decode(answers: list[Answer]) -> None:
    """Until the first tokens of all have come, and before all have ended."""
    while not all(answer.num_tokens > 2 for answer in answers):
        await asyncio.sleep(0.005)
    assert any(None in answer.reasons for answer in answers)


@pytest.mark.parametrize("victim", [PREFILL, DECODE], ids=["B1_prefill", "B2_decode"])
@pytest.mark.parametrize("moment", ["prefill", "decode"])
async def test_a_worker_killed_while_all_stream(
    disaggregated: ServerProcess, victim: int, moment: str
) -> None:
    undisturbed = await run_all(disaggregated, NUM_TOKENS)

    async def kill(answers: list[Answer]) -> None:
        if moment == "decode":
            await until_all_decode(answers)
        else:
            await asyncio.sleep(0.1)
        os.kill(pid(disaggregated, victim), signal.SIGKILL)

    disaggregated.post("/reset_prefix_cache", {})
    disturbed = await run_all(disaggregated, NUM_TOKENS, kill)
    for answer, wanted in zip(disturbed, undisturbed, strict=True):
        answer.assert_same(wanted)
    await wait_until_healthy(disaggregated, *((2, 1) if victim == PREFILL else (1, 2)))
    assert_all_home(disaggregated)
    for answer, wanted in zip(await run_all(disaggregated, NUM_TOKENS), undisturbed, strict=True):
        answer.assert_same(wanted)


async def test_b3_a_worker_that_is_stopped_is_replaced(disaggregated: ServerProcess) -> None:
    undisturbed = await run_all(disaggregated, NUM_TOKENS)

    async def stop(answers: list[Answer]) -> None:
        await until_all_decode(answers)
        os.kill(pid(disaggregated, DECODE), signal.SIGSTOP)

    for answer, wanted in zip(
        await run_all(disaggregated, NUM_TOKENS, stop), undisturbed, strict=True
    ):
        answer.assert_same(wanted)
    await wait_until_healthy(disaggregated, 1, 2)
    assert_all_home(disaggregated)


async def test_b6_b8_both_workers_die_and_requests_wait(disaggregated: ServerProcess) -> None:
    undisturbed = await run_all(disaggregated, NUM_TOKENS)

    async def kill_both(answers: list[Answer]) -> None:
        await until_all_decode(answers)
        for worker in disaggregated.workers():
            os.kill(worker, signal.SIGKILL)

    for answer, wanted in zip(
        await run_all(disaggregated, NUM_TOKENS, kill_both), undisturbed, strict=True
    ):
        answer.assert_same(wanted)
    await wait_until_healthy(disaggregated, 2, 2)
    assert_all_home(disaggregated)


async def test_b6_a_new_request_waits_while_the_only_worker_is_away(
    one_worker: ServerProcess,
) -> None:
    (worker,) = one_worker.workers()
    os.kill(worker, signal.SIGKILL)
    client = one_worker.client()
    ask = asyncio.create_task(
        asyncio.to_thread(client.completions.create, model=MODEL, prompt="And then", max_tokens=4)
    )
    assert (await ask).usage is not None
    await wait_until_healthy(one_worker, 2)
    assert_all_home(one_worker)
    with urllib.request.urlopen(one_worker.url + "/metrics", timeout=10) as response:
        metrics = response.read().decode()
    assert re.search(r"^memserve:worker_deaths_total\{.*\} 1\.0$", metrics, re.MULTILINE)
    assert re.search(r"^memserve:worker_restarts_total\{.*\} 1\.0$", metrics, re.MULTILINE)


async def test_b9_a_stop_string_across_a_death_ends_the_answer(one_worker: ServerProcess) -> None:
    """What the front end holds back because it may be a stop string outlives the worker."""

    async def ask(client: openai.AsyncOpenAI, stop: str | None, *, kill: bool) -> str:
        text, num_chunks = "", 0
        chunks = await client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=30,
            temperature=0,
            stop=stop,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in chunks:
            text += chunk.choices[0].text
            num_chunks += 1
            if kill and num_chunks == 8:
                (worker,) = one_worker.workers()
                os.kill(worker, signal.SIGKILL)
        return text

    async with one_worker.async_client() as client:
        whole = await ask(client, None, kill=False)
        stop = whole[len(whole) // 2 : len(whole) // 2 + 25]
        assert await ask(client, stop, kill=True) == whole[: whole.index(stop)]
    await wait_until_healthy(one_worker, 2)
    assert_all_home(one_worker)
