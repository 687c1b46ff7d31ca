"""Groups over a real model: KV, logits and greedy answers of a group equal those of one instance."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.model.prepared import PreparedModel
from memserve.pool.refs import BlockRef, DType, Tier
from tests.model.tiny import ARCHITECTURES, VOCAB, save
from tests.workers.by_hand import HandEngine
from tests.workers.groups import FakeLauncher, running
from tests.workers.real_models import engines_of, kv, logits, submit, teacher
from tests.workers.rig import BLOCK_SIZE

MAX_TOKENS = 6
TOLERANCE = 1e-4
TICKET = 1


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alone(launcher: FakeLauncher, engine: HandEngine, ticket: int, prompt: list[int]) -> None:
    """Let one instance answer; `logits` has what it said."""
    submit(engine, ticket, prompt, MAX_TOKENS)
    launcher.until(lambda: engine.finished(ticket))


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Logits of the same text; greedy tokens are those of one instance, or tie with them."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= TOLERANCE
    chosen = got.gather(1, wanted.argmax(1, keepdim=True))
    assert (chosen[:, 0] >= got.amax(1) - TOLERANCE).all()


def random_prompt(length: int, seed: int) -> list[int]:
    random_ = random.Random(seed)
    return [random_.randrange(3, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_kv_and_answer_equal_those_of_one_instance(
    tmp_path: Path, name: str, num_ranks: int
) -> None:
    folder = save(ARCHITECTURES[name].config(), tmp_path)
    prompt = random_prompt(151, seed=1)
    made = engines_of(folder, num_ranks + 1)
    *ranks, single = made
    with running(*made) as launcher:
        single.submit(TICKET, prompt, max_tokens=MAX_TOKENS)
        launcher.until(lambda: single.finished(TICKET))
        wanted = kv(made, single.refs(prompt), 148)
        teacher(ranks[0]).told[TICKET] = single.tokens(TICKET)
        asked = launcher.submit(
            TICKET, prompt, range(num_ranks), chunk_tokens=20, max_tokens=MAX_TOKENS, keeps=True
        )
        launcher.finish(TICKET)
        found = kv(made, asked.refs, 148)
        assert_same(logits(ranks[0], TICKET), logits(single, TICKET))
    assert (found - wanted).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeLauncher]:
    """Four instances for groups, and one to compare with."""
    folder = save(ARCHITECTURES["llama"].config(), tmp_path_factory.mktemp("tiny"))
    with running(*engines_of(folder, 5)) as launcher:
        yield launcher


NUM_MOST = 32
"""Blocks of the longest prompt, and one token more."""

CHUNKS = st.sampled_from([1, 4, 9, 12, 16, 20, 64])


@settings(max_examples=150, deadline=None)
@given(
    instances=st.permutations(range(4)),
    num_ranks=st.integers(2, 4),
    num_blocks=st.integers(0, NUM_MOST),
    beyond=st.integers(-1, 1),
    holder=st.sampled_from(["nobody", "one rank", "all ranks"]),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]),
    turn=st.integers(0, 3),
    chunk_tokens=st.tuples(CHUNKS, CHUNKS),
)
def test_logits_equal_those_of_one_instance_over_any_cut_and_prefix(
    five: FakeLauncher,
    instances: list[int],
    num_ranks: int,
    num_blocks: int,
    beyond: int,
    holder: str,
    share: float,
    turn: int,
    chunk_tokens: tuple[int, int],
) -> None:
    ticket = 10 * len(five.requests) + 1
    ranks = instances[:num_ranks]
    length = max(1, num_blocks * BLOCK_SIZE + beyond)
    prompt = random_prompt(length, seed=ticket)
    num_cached = round(share * ((length - 1) // BLOCK_SIZE))
    cached: Sequence[BlockRef] = []
    if holder == "one rank" and num_cached:
        owner = five.engines[ranks[-1]]
        owner.submit(ticket, prompt, max_tokens=1)
        five.until(lambda: owner.finished(ticket))
        cached = owner.refs(prompt)[:num_cached]
    elif holder == "all ranks" and num_cached:
        first = five.submit(
            ticket, prompt, ranks, chunk_tokens=chunk_tokens[0], max_tokens=1, keeps=True
        )
        five.finish(ticket)
        cached = first.refs[:num_cached]
    single, order = five.engines[4], ranks[turn % num_ranks :] + ranks[: turn % num_ranks]
    told = random_prompt(MAX_TOKENS, seed=ticket + 1)
    for engine in (single, five.engines[order[0]]):
        teacher(engine).told[ticket + 1] = told
    alone(five, single, ticket + 1, prompt)
    asked = five.submit(
        ticket + 1,
        prompt,
        order,
        chunk_tokens=chunk_tokens[1],
        cached=cached,
        max_tokens=MAX_TOKENS,
    )
    five.finish(ticket + 1)
    assert asked.tokens == told
    assert asked.answer[0].num_cached_tokens == len(cached) * BLOCK_SIZE
    assert_same(logits(five.engines[order[0]], ticket + 1), logits(single, ticket + 1))
    if ticket in five.requests:
        five.abort(ticket)


def test_a_prefix_in_slower_memory_of_a_rank_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = save(ARCHITECTURES["llama"].config(), tmp_path)
    made = engines_of(folder, 2, num_blocks=24, num_dram_blocks=64)
    with running(*made) as launcher:
        owner, document = made[1], random_prompt(10 * BLOCK_SIZE, seed=1)
        owner.submit(1, document, max_tokens=1)
        for ticket in (2, 3, 4):  # history of late drives the older out
            owner.submit(ticket, random_prompt(18 * BLOCK_SIZE, seed=ticket), max_tokens=1)
            launcher.until(lambda ticket=ticket: owner.finished(ticket))  # type: ignore[misc]
        cached = owner.refs(document)
        assert {ref.tier for ref in cached} == {Tier.DRAM}
        prompt = [*document, *random_prompt(21, seed=9)]
        asked = launcher.submit(5, prompt, (0, 1), cached=cached, max_tokens=MAX_TOKENS)
        launcher.finish(5)
        assert asked.answer[0].num_cached_tokens == len(document)
        told = teacher(made[1]).told[6] = asked.tokens
        alone(launcher, made[1], 6, prompt)
        assert len(told) == MAX_TOKENS
        assert_same(logits(made[0], 5), logits(made[1], 6))


# The demo model


@pytest.fixture(scope="module")
def words(demo_model: PreparedModel) -> list[int]:
    """Token ids of English text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(demo_model.tokenizer_file))
    text = (Path(__file__).parent.parent.parent / "README.md").read_text()
    ids: list[int] = tokenizer.encode(text).ids
    assert len(ids) > 400
    return ids


PAGE = 16


def demo_engines(demo_model: PreparedModel, number: int, dtype: DType) -> list[HandEngine]:
    return engines_of(
        Path(demo_model.weights),
        number,
        dtype=dtype,
        block_size=PAGE,
        max_num_batched_tokens=128,
    )


@pytest.mark.parametrize(
    "num_ranks",
    [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_the_demo_model_in_float32_answers_in_groups_as_alone(
    demo_model: PreparedModel, words: list[int], num_ranks: int
) -> None:
    made = demo_engines(demo_model, num_ranks, "float32")
    chunk = 2 * num_ranks * PAGE
    with running(*made) as launcher:
        # A block; around two blocks for each of a rank's slices; more than one chunk.
        for number, length in enumerate([PAGE, chunk - 1, chunk + 1, 5 * chunk // 4 + 7]):
            ticket, prompt = 10 * number, words[number : number + length]
            alone(launcher, made[0], ticket, prompt)
            first = launcher.submit(
                ticket + 1,
                prompt,
                range(num_ranks),
                chunk_tokens=2 * PAGE,
                max_tokens=1,
                keeps=True,
            )
            launcher.finish(ticket + 1)
            assert_same(logits(made[0], ticket + 1), logits(made[0], ticket)[:1])
            again = launcher.submit(
                ticket + 2,
                prompt,
                [*range(1, num_ranks), 0],
                chunk_tokens=PAGE,
                cached=first.refs[: (length - 1) // PAGE // 2],
                max_tokens=MAX_TOKENS,
            )
            launcher.finish(ticket + 2)
            assert again.tokens == made[0].tokens(ticket)
            assert_same(logits(made[1], ticket + 2), logits(made[0], ticket))
            launcher.abort(ticket + 1)


def errors_in_bfloat16(
    rounded: list[HandEngine], exact: HandEngine, prompts: list[list[int]]
) -> tuple[float, float]:
    """Root mean square of what logits in bfloat16 are off, of groups of all and of one instance."""
    off: list[torch.Tensor] = []
    off_alone: list[torch.Tensor] = []
    with running(exact) as launcher:
        for ticket, prompt in enumerate(prompts):
            alone(launcher, exact, ticket, prompt)
    with running(*rounded) as launcher:
        for ticket, prompt in enumerate(prompts):
            group = ticket + len(prompts)
            for one in (ticket, group):
                teacher(rounded[0]).told[one] = exact.tokens(ticket)
            alone(launcher, rounded[0], ticket, prompt)
            launcher.submit(
                group, prompt, range(len(rounded)), chunk_tokens=2 * PAGE, max_tokens=MAX_TOKENS
            )
            launcher.finish(group)
            off.append(logits(rounded[0], group) - logits(exact, ticket))
            off_alone.append(logits(rounded[0], ticket) - logits(exact, ticket))
    return (
        float(torch.cat(off).square().mean().sqrt()),
        float(torch.cat(off_alone).square().mean().sqrt()),
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_in_bfloat16_groups_are_no_further_off_than_one_instance(tmp_path: Path, name: str) -> None:
    folder = save(ARCHITECTURES[name].config(), tmp_path)
    (exact,) = engines_of(folder, 1)
    prompts = [random_prompt(length, seed=length) for length in range(40, 200, 13)]
    rounded = engines_of(folder, 3, dtype="bfloat16")
    group, single = errors_in_bfloat16(rounded, exact, prompts)
    assert 0 < group <= 1.2 * single


def test_the_demo_model_in_bfloat16_is_no_further_off_in_groups_than_alone(
    demo_model: PreparedModel, words: list[int]
) -> None:
    (exact,) = demo_engines(demo_model, 1, "float32")
    prompts = [words[start : start + 90 + 31 * start] for start in range(3)]
    group, single = errors_in_bfloat16(demo_engines(demo_model, 2, "bfloat16"), exact, prompts)
    assert 0 < group <= 1.2 * single
