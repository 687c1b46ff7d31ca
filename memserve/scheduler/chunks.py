"""How many prompt tokens a step may compute beside sequences that decode: these keep their pace.

A prompt's chunk holds up everyone who decodes in the same step. With an objective for the time between
tokens (`--slo-tpot`), chunks are as long as a step leaves room for beside its decoding sequences (the
token budget of Sarathi-Serve, arXiv 2403.02310, from a cost model that follows the load). So no queue
of prompts can push running answers past the objective; what it costs is prompts' time, and that is what
`--slo-ttft` is there to bound.

Contract: vectors over the slots of `Loads`. A step that decodes nothing has no bound but the
operator's, and there are always `LEAST_TOKENS`, so every prompt goes on.
"""

import numpy as np

from memserve.scheduler.cost import TILE_ROWS, Floats, StepCosts

SHARE = 0.9
"""Of the objective that a step may take by the model: predictions err, and some steps take longer."""

LEAST_TOKENS = 2 * TILE_ROWS


def chunk_tokens(
    most: int, objective: float, alone: Floats, decoding: Floats, token: Floats, prefilling: Floats
) -> Floats:
    """Prompt tokens in a step on each slot, `most` at most.

    A step without any takes `decoding` seconds (0: nobody decodes), or `alone` if only one does, and
    each adds `token`; prefills alone will take `prefilling` as a share of the time. Where not even one
    sequence could keep the objective, it bounds nothing.
    """
    bound = SHARE * objective
    room = np.maximum(bound - decoding, LEAST_TOKENS * token)
    # Chunks as long as the bound allows have decoding beside them, and so take longer.
    busy = np.minimum(1.0, prefilling * (1 + decoding / room))
    # A second gives (1 - busy) / decoding tokens without prompts, and busy / longest beside them.
    lacking = 1 / bound - (1 - busy) / np.maximum(decoding, 1e-9)
    longest = np.where(lacking > 0, busy / np.maximum(lacking, 1e-9), np.inf)
    tokens = np.floor((longest - decoding) / token / TILE_ROWS) * TILE_ROWS
    free = (decoding == 0) | (alone > bound)
    return np.where(free, float(most), np.clip(tokens, LEAST_TOKENS, most))


def token_seconds(costs: StepCosts, batch: Floats, most: int, num_prompt_tokens: int) -> Floats:
    """What each of `most` tokens adds to a step that decodes `batch`, halfway through such a prompt."""
    rows = np.round(batch)
    seconds = (costs.rows(rows + most) - costs.rows(rows)) / most
    return np.maximum(seconds + costs.prefill_pair * num_prompt_tokens / 2, 1e-9)
