"""The openai client against a real server, with one prefill and one decode worker."""

import asyncio
import subprocess
import sys
from typing import Any, cast

import openai
import pytest

from tests.e2e.servers import ServerProcess, assert_all_home

MODEL = "SmolLM2-135M-Instruct"


def streamed(client: openai.OpenAI, messages: list[Any]) -> tuple[str, Any]:
    """Text and usage of a streamed answer."""
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text, usage


def test_a_second_turn_reuses_the_first(disaggregated: ServerProcess) -> None:
    client = disaggregated.client()
    messages: list[Any] = [{"role": "user", "content": "Tell me three facts about the moon. " * 4}]
    answer, usage = streamed(client, messages)
    assert answer
    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And about the sun?"},
    ]
    _, usage = streamed(client, messages)
    assert usage.prompt_tokens_details.cached_tokens >= 48
    assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens
    assert_all_home(disaggregated)


def test_a_second_turn_finds_the_whole_first_answer(one_worker: ServerProcess) -> None:
    """Also where encoding the answer again would give other tokens."""
    client = one_worker.client()
    messages: list[Any] = [{"role": "user", "content": "Sing!"}]
    letters = one_worker.post("/tokenize", {"prompt": "l"})["tokens"]
    letters += one_worker.post("/tokenize", {"prompt": "a"})["tokens"]
    asked: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    first = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=48,
        logit_bias={str(letter): 100 for letter in letters},
        extra_body=asked,
    ).to_dict()
    (choice,) = cast(list[Any], first["choices"])
    text = choice["message"]["content"]
    assert choice["token_ids"] != one_worker.post("/tokenize", {"prompt": text})["tokens"]
    served = cast(list[int], first["prompt_token_ids"]) + choice["token_ids"]
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "More!"}]
    second = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_body=asked
    )
    prompt = cast(list[int], second.to_dict()["prompt_token_ids"])
    assert prompt[: len(served)] == served
    # The last token of an answer has no KV when the answer ends.
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == (len(served) - 1) // 16 * 16


def test_the_demo_model_knows_the_capital_of_france(disaggregated: ServerProcess) -> None:
    completion = disaggregated.client().completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=1, temperature=0
    )
    assert completion.choices[0].text == " Paris"


async def test_thirty_two_streams_at_once_all_end(disaggregated: ServerProcess) -> None:
    async def stream(client: openai.AsyncOpenAI, number: int) -> int:
        count = 0
        async for chunk in await client.completions.create(
            model=MODEL,
            prompt=f"Story number {number}: Once upon a time",
            max_tokens=16,
            temperature=0.8,
            seed=number,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ):
            count += sum(len(getattr(choice, "token_ids", ())) for choice in chunk.choices)
        return count

    async with disaggregated.async_client() as client:
        counts = await asyncio.gather(*(stream(client, number) for number in range(32)))
    assert counts == [16] * 32
    assert_all_home(disaggregated)


@pytest.mark.parametrize("stop_after", [0, 1, 5])
async def test_a_client_that_leaves_frees_its_pages(
    disaggregated: ServerProcess, stop_after: int
) -> None:
    async with disaggregated.async_client() as client:
        for _ in range(3):
            stream = await client.completions.create(
                model=MODEL,
                prompt="word " * 600,
                max_tokens=500,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for _ in range(stop_after):
                await anext(stream.__aiter__())
            await stream.close()
    assert_all_home(disaggregated)


async def test_a_client_that_leaves_during_prefill_frees_its_pages(
    disaggregated: ServerProcess,
) -> None:
    async with disaggregated.async_client() as client:
        for delay in (0.01, 0.05, 0.2, 0.4):
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=delay).completions.create(
                    model=MODEL,
                    prompt="many " * 4000,
                    max_tokens=400,
                    extra_body={"ignore_eos": True},
                )
    assert_all_home(disaggregated)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_past_its_time_frees_its_pages(
    disaggregated: ServerProcess, stream: bool
) -> None:
    client = disaggregated.client()
    for limit in (0.01, 0.1, 1.0):  # while it is prefilled, handed over, decoded
        with pytest.raises(openai.APIError, match="longer than it may"):
            finish(
                client.completions.create(
                    model=MODEL,
                    prompt="many " * 4000,
                    max_tokens=2000,
                    stream=stream,
                    extra_body={"ignore_eos": True, "timeout": limit},
                )
            )
    assert_all_home(disaggregated)


def finish(answer: Any) -> None:
    """Take all of a stream; a whole answer is there."""
    for _ in answer:
        pass


def chat(*arguments: str, lines: str) -> "subprocess.CompletedProcess[str]":
    """`memserve chat` with these lines typed in."""
    options = ("--temperature", "0", "--max-tokens", "40")
    command = [sys.executable, "-m", "memserve", "chat", *options, *arguments]
    return subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=60, check=False
    )


def num_cached_tokens(server: ServerProcess) -> int:
    instances = server.get("/admin/pool")["instances"]
    return sum(each["stats"]["num_cached_tokens"] for each in instances)


def test_the_terminal_chat_sends_what_was_said_before(disaggregated: ServerProcess) -> None:
    before = num_cached_tokens(disaggregated)
    run = chat(
        "--url",
        disaggregated.url,
        "--system",
        "You know everything about calendars, and you like to tell.",
        lines="How many days are in a week?\nAnd in a year?\n\n",
    )
    assert run.returncode == 0, run.stderr
    assert "7 days" in run.stdout
    assert run.stdout.count("you> ") == 3
    assert num_cached_tokens(disaggregated) >= before + 32


def test_the_terminal_chat_says_when_no_server_answers() -> None:
    run = chat("--url", "http://127.0.0.1:1", lines="Hello\n")
    assert run.returncode == 2
    assert run.stderr.strip() == "memserve: no server answers at http://127.0.0.1:1"
