"""Prompts prefilled by groups of engines, over the oracle that checks every cell it reads."""

import pytest

from tests.workers.by_hand import HandEngine
from tests.workers.groups import running
from tests.workers.rig import BLOCK_SIZE, oracle_answer


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_group_gives_the_answer_of_one_instance(num_ranks: int) -> None:
    made = [HandEngine(i, num_blocks=64) for i in range(num_ranks)]
    with running(*made) as launcher:
        lengths = [*range(1, 4 * num_ranks * BLOCK_SIZE + 2, 3)]
        for ticket, length in enumerate(lengths, start=1):
            prompt = [(7 * ticket + i) % 50 for i in range(length)]
            asked = launcher.submit(ticket, prompt, range(num_ranks), chunk_tokens=8)
            launcher.finish(ticket)
            assert asked.tokens == oracle_answer(prompt, 3)
        launcher.until(lambda: all(not engine.engine._groups for engine in made))
