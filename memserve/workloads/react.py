"""Agents that think, act and observe, in the shape of ReAct on HotpotQA.

Every episode begins with the same few-shot examples, then its question; each step appends the agent's
answer and what it observed. Lengths give the paper's figures for prompts (median 2210, 90th percentile
2558, mean 2220) and answers (127, 312, 162).
"""

from collections.abc import Iterator

import numpy as np

from memserve.workloads.drawing import Quantiles, synthetic_tokens
from memserve.workloads.sessions import Limits, Turn

EXAMPLES = 1940
"""Tokens that all episodes have in common."""
QUESTION = Quantiles((0, 0.5, 0.9, 1), (12, 24, 45, 70))
OBSERVATION = Quantiles((0, 0.5, 0.9, 1), (8, 50, 130, 180))
ANSWER = Quantiles((0, 0.25, 0.5, 0.9, 1), (24, 70, 127, 312, 460))
NUM_STEPS = (0.05, 0.2, 0.4, 0.35)
"""Shares of episodes with 1, 2 … calls."""


def react(seed: int, vocab: range, limits: Limits) -> Iterator[list[Turn]]:
    """Episodes without end."""
    rng = np.random.default_rng((seed, 3))
    examples = synthetic_tokens(vocab, limits.scaled(EXAMPLES), seed, "react examples")
    number = 0
    while True:
        num_steps = int(rng.choice(len(NUM_STEPS), p=NUM_STEPS)) + 1
        turns = []
        for step in range(num_steps):
            length = (OBSERVATION if step else QUESTION).draw(rng)
            new = synthetic_tokens(vocab, limits.scaled(length), seed, "react", number, step)
            output_length = limits.output(ANSWER.draw(rng))
            if step == 0:
                room = limits.prompt_room(output_length)
                kept = len(examples) if room is None else max(0, room - len(new))
                new = examples[:kept] + new
            turns.append(Turn(tokens=new, output_length=output_length))
        yield turns
        number += 1
