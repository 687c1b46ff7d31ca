"""Whether a token that differs was a tie within rounding.

The rule: transformers' own model, in float32 and without a cache, is given the prompt and the tokens
that both answers have. The sampler draws from its scores, disturbed at random by up to half of
`TIE` each, so that two scores come nearer by up to `TIE`: the difference was a tie if both tokens are
drawn, and nothing but the two. Greedy, seeded and penalised choices are judged alike, by the code
that draws them in earnest.

Loads torch and the model; only for answers that differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memserve.chaos.judging import Difference
from memserve.messages import SamplingParams
from memserve.model.prepared import PreparedModel
from memserve.model.sampling import SampleRow, sample

TIE = 1e-3
"""Of scores, that is logits."""
NUM_DRAWS = 256


def count_ties(differences: Sequence[Difference], model: PreparedModel) -> list[bool]:
    """Which of them were ties."""
    if not differences:
        return []
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(
        Path(model.weights), dtype=torch.float32, local_files_only=True
    ).eval()
    verdicts = []
    for each in differences:
        with torch.inference_mode():
            ids = torch.tensor([[*each.prompt, *each.common]])
            logits = module(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        verdicts.append(is_tie(logits, each, model.eos_token_ids))
    return verdicts


def is_tie(logits: torch.Tensor, difference: Difference, eos_token_ids: Sequence[int]) -> bool:
    """Whether these scores, float32 [vocab_size], draw either token when slightly disturbed."""
    row = SampleRow(
        sampling=sampling_of(difference.asked.body),
        choice=difference.choice,
        position=len(difference.common),
        prompt=difference.prompt,
        output=difference.common,
        eos_token_ids=eos_token_ids,
    )
    generator = torch.Generator().manual_seed(1)
    drawn = set()
    for _ in range(NUM_DRAWS):
        noise = torch.rand(logits.shape, generator=generator) - 0.5
        drawn.add(sample((logits + TIE * noise)[None], [row])[0].token)
    return {difference.wanted, difference.got} <= drawn


def sampling_of(body: Any) -> SamplingParams:  # noqa: ANN401
    """How a request of ours chooses its tokens."""
    names = {"temperature", "top_p", "repetition_penalty", "presence_penalty"}
    names |= {"frequency_penalty", "min_tokens", "ignore_eos"}
    given = {name: value for name, value in body.items() if name in names}
    return SamplingParams(max_tokens=body["max_tokens"], seed=body.get("seed", 0), **given)
