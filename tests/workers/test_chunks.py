"""A prompt's chunks beside sequences that decode are as short as it came with."""

from tests.workers.by_hand import HandEngine, engines

STREAM, PROMPT = [3, *range(9)], [5, *range(39)]
BUDGET = 16  # tokens of a step, as `by_hand` has it


def steps_until_first_token(engine: HandEngine, ticket: int) -> int:
    """Each gives every stream a token."""
    num = 0
    while not engine.tokens(ticket):
        engine.step()
        num += 1
    return num


def test_beside_a_stream_a_prompt_is_computed_in_the_chunks_that_it_came_with() -> None:
    with engines(engine := HandEngine(0)):
        engine.submit(1, STREAM, max_tokens=40)
        steps_until_first_token(engine, 1)
        engine.submit(2, PROMPT, chunk_tokens=4)
        assert steps_until_first_token(engine, 2) == len(PROMPT) // 4
        assert len(engine.tokens(1)) == 1 + len(PROMPT) // 4
        engine.finish(1, 2)
        assert engine.answers(STREAM, 1, max_tokens=40)
        assert engine.answers(PROMPT, 2)
        engine.assert_home()


def test_without_streams_or_without_a_bound_steps_are_full() -> None:
    with engines(engine := HandEngine(0)):
        engine.submit(1, PROMPT, chunk_tokens=4)
        assert steps_until_first_token(engine, 1) == -(-len(PROMPT) // BUDGET)
        engine.finish(1)
        engine.submit(2, STREAM, max_tokens=40)
        steps_until_first_token(engine, 2)
        engine.submit(3, [token + 50 for token in PROMPT])
        assert steps_until_first_token(engine, 3) == -(-len(PROMPT) // (BUDGET - 1))
        engine.finish(2, 3)
        engine.assert_home()


def test_the_prompt_that_comes_next_says_how_long_all_of_a_steps_chunks_are() -> None:
    with engines(engine := HandEngine(0)):
        engine.submit(1, STREAM, max_tokens=40)
        steps_until_first_token(engine, 1)
        engine.submit(2, PROMPT[:6], chunk_tokens=4)
        engine.submit(3, [token + 50 for token in PROMPT], chunk_tokens=12)
        assert steps_until_first_token(engine, 2) == 2
        # The second step had two tokens of the one and two of the other.
        assert steps_until_first_token(engine, 3) == -(-(len(PROMPT) - 2) // 12)
        engine.finish(1, 2, 3)
        engine.assert_home()
