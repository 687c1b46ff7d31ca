"""The openai client against a real server, with one prefill and one decode worker."""

import asyncio
from typing import Any

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


def test_the_demo_model_knows_the_capital_of_france(disaggregated: ServerProcess) -> None:
    text, _ = streamed(
        disaggregated.client(),
        [{"role": "user", "content": "What is the capital of France?"}],
    )
    assert "Paris" in text


async def test_thirty_two_streams_at_once_all_end(disaggregated: ServerProcess) -> None:
    client = disaggregated.async_client()

    async def stream(number: int) -> int:
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

    assert await asyncio.gather(*(stream(number) for number in range(32))) == [16] * 32
    assert_all_home(disaggregated)


def test_seeded_sampling_repeats_itself_whatever_runs_beside_it(
    disaggregated: ServerProcess,
) -> None:
    client = disaggregated.client()

    def ask(n: int) -> list[str]:
        completion = client.completions.create(
            model=MODEL, prompt="A list of animals:", max_tokens=12, seed=7, temperature=0.9, n=n
        )
        return [choice.text for choice in completion.choices]

    once, again = ask(1), ask(3)
    assert len(set(again)) > 1
    assert len(once) == 1


@pytest.mark.parametrize("stop_after", [0, 1, 5])
async def test_a_client_that_leaves_frees_its_pages(
    disaggregated: ServerProcess, stop_after: int
) -> None:
    client = disaggregated.async_client()
    for _ in range(3):
        stream = await client.completions.create(
            model=MODEL,
            prompt="word " * 600,
            max_tokens=500,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        count = 0
        if stop_after:
            async for _ in stream:
                count += 1
                if count == stop_after:
                    break
        await stream.close()
    assert_all_home(disaggregated)


async def test_a_client_that_leaves_during_prefill_frees_its_pages(
    disaggregated: ServerProcess,
) -> None:
    client = disaggregated.async_client()
    for delay in (0.01, 0.05, 0.2, 0.4):
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=delay).completions.create(
                model=MODEL, prompt="many " * 4000, max_tokens=400, extra_body={"ignore_eos": True}
            )
    assert_all_home(disaggregated)
