"""Every layout gives the tokens that transformers gives, in float32."""

from typing import Any

import pytest

from memserve.model.prepared import PreparedModel
from tests.e2e.greedy import assert_greedy
from tests.e2e.servers import ServerProcess, assert_all_home

MODEL = "SmolLM2-135M-Instruct"
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In the year 1969, " * 20,
    "one two three four five " * 120,  # more than one step takes
]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def reference(demo_model: PreparedModel) -> Any:
    """The demo model as transformers runs it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(demo_model.weights, dtype=torch.float32).eval()


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "code", "long", "chunked"])
def test_greedy_tokens_are_those_of_transformers(
    any_layout: ServerProcess, reference: Any, prompt: str
) -> None:
    for _ in range(2):  # the second time from the cache
        completion = any_layout.client().completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        choice: Any = completion.choices[0]
        assert len(choice.token_ids) == NUM_TOKENS
        assert_greedy(reference, choice.prompt_token_ids, choice.token_ids)
    assert completion.usage is not None
    details = completion.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == (completion.usage.prompt_tokens - 1) // 16 * 16
    assert_all_home(any_layout)


def test_logprobs_are_those_of_transformers(any_layout: ServerProcess, reference: Any) -> None:
    import torch

    completion: Any = any_layout.client().completions.create(
        model=MODEL,
        prompt=PROMPTS[0],
        max_tokens=8,
        temperature=0,
        logprobs=3,
        extra_body={"return_token_ids": True},
    )
    choice = completion.choices[0]
    ids = torch.tensor([choice.prompt_token_ids + choice.token_ids])
    with torch.inference_mode():
        scores = reference(ids).logits[0, len(choice.prompt_token_ids) - 1 : -1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]
    assert choice.logprobs.token_logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_seeded_sampling_repeats_itself_whatever_runs_beside_it(any_layout: ServerProcess) -> None:
    def ask(n: int) -> list[str]:
        completion = any_layout.client().completions.create(
            model=MODEL, prompt="A list of animals:", max_tokens=12, seed=7, temperature=0.9, n=n
        )
        return [choice.text for choice in completion.choices]

    alone, together = ask(1), ask(3)
    assert alone[0] == together[0]
    assert len(set(together)) > 1


def test_every_handover_has_succeeded(any_layout: ServerProcess) -> None:
    instances = any_layout.get("/admin/pool")["instances"]
    stats = [each["stats"] for each in instances]
    assert [each["num_declined"] + each["num_failed_pulls"] for each in stats] == [0] * len(stats)
    if any(each["name"].startswith("prefill") for each in instances):
        assert sum(each["num_handovers"] for each in stats) > 0
