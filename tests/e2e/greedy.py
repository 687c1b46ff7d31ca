"""Whether an answer is greedy by a reference model, near-ties allowed."""

from typing import Any

import torch

NEAR_TIE = 1e-3


def assert_greedy(
    reference: Any, prompt: list[int], answer: list[int], *, within: float = NEAR_TIE
) -> None:
    """Every token of the answer has the highest score, or one that is hardly below it."""
    ids = torch.tensor([prompt + answer])
    with torch.inference_mode():
        scores = reference(ids).logits[0, len(prompt) - 1 : -1]
    chosen = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert torch.all(scores.max(1).values - chosen < within)
