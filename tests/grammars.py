"""What tests of grammars share: a tokenizer's table, and answers drawn at random along a grammar."""

import random
from array import array

from memserve.workers.grammars import Grammars
from tests.fakes import EOS


def drawn(grammars: Grammars, grammar: str, seed: int, *, most: int = 2000) -> list[int] | None:
    """Tokens up to the end of an answer, each drawn from what may come next; None: no end in time."""
    draw, follower = random.Random(seed), grammars.follower(grammar)
    answer = array("i")
    while len(answer) < most:
        may = follower.allowed(answer).nonzero()[0].tolist()
        token = draw.choice(may)
        if token == EOS:
            return answer.tolist()
        answer.append(token)
    return None
