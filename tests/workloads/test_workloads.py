"""The sessions of every workload: same seed same tokens, the promised lengths, the promised sharing."""

import gzip
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.errors import UsageError
from memserve.workloads import (
    Document,
    Limits,
    Session,
    Workload,
    drawn_answer,
    make_sessions,
    synthetic_tokens,
)
from memserve.workloads.synthetic import PrefixLengths, RandomLengths

DRAWN = ("sharegpt", "loogle", "react", "shared-documents", "prefix-repetition", "random")
VOCAB = range(100, 1000)


def sessions_of(name: str, num_requests: int = 60, **changes: Any) -> list[Session]:
    workload = Workload(name=name, num_requests=num_requests, vocab=VOCAB, **changes)
    return list(make_sessions(workload))


def prompts_of(sessions: Iterable[Session]) -> list[list[int]]:
    """Every prompt, with drawn answers in the place of a model's."""
    return [
        session.prompt([drawn_answer(VOCAB, session, earlier) for earlier in range(turn)])
        for session in sessions
        for turn in range(len(session.turns))
    ]


def common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_gives_the_same_sessions_and_another_seed_others(name: str) -> None:
    once, again, other = (sessions_of(name, seed=seed, rate=2.0) for seed in (1, 1, 2))
    assert once == again
    assert [session.turns for session in once] != [session.turns for session in other]
    assert [session.start for session in once] != [session.start for session in other]


@pytest.mark.parametrize("name", DRAWN)
def test_the_number_of_requests_is_exact_and_tokens_come_from_the_vocabulary(name: str) -> None:
    sessions = sessions_of(name, 47)
    assert sum(len(session.turns) for session in sessions) == 47
    assert len({session.session_id for session in sessions}) == len(sessions)
    for turn in itertools.chain.from_iterable(session.turns for session in sessions):
        assert turn.tokens
        assert set(turn.tokens) <= set(VOCAB)
        assert turn.output_length >= 1


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("sharegpt", (622, 1843, 770), (291, 635, 321)),
        ("react", (2210, 2558, 2220), (127, 312, 162)),
        ("loogle", (1759, 2004, 1794), (19, 41, 22)),
    ],
)
def test_lengths_have_the_papers_median_tail_and_mean(
    name: str, prompt: tuple[int, int, int], answer: tuple[int, int, int]
) -> None:
    prompts, answers = [], []
    for session in sessions_of(name, 3000):
        said = 0
        for turn in session.turns:
            prompts.append(said + len(turn.tokens))
            answers.append(turn.output_length)
            said = prompts[-1] + answers[-1]
    for lengths, wanted in ((prompts, prompt), (answers, answer)):
        seen = (np.median(lengths), np.quantile(lengths, 0.9), np.mean(lengths))
        assert seen == pytest.approx(wanted, rel=0.1)


def test_a_prompt_is_all_that_was_said_before_and_the_new_tokens() -> None:
    session = next(session for session in sessions_of("sharegpt") if len(session.turns) > 2)
    first, second = [1, 2, 3], [4]
    assert session.prompt([]) == session.turns[0].tokens
    assert session.prompt([first, second]) == [
        *session.turns[0].tokens,
        *first,
        *session.turns[1].tokens,
        *second,
        *session.turns[2].tokens,
    ]


def test_five_questions_share_each_document_and_documents_share_nothing() -> None:
    prompts = prompts_of(sessions_of("loogle", 40))
    by_start: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt in prompts:
        by_start.setdefault(tuple(prompt[:16]), []).append(prompt)
    assert [len(group) for group in by_start.values()] == [5] * 8
    for group in by_start.values():
        shared = min(common(group[0], other) for other in group[1:])
        assert shared / np.mean([len(prompt) for prompt in group]) > 0.95
    firsts = [group[0] for group in by_start.values()]
    assert max(common(a, b) for a, b in itertools.combinations(firsts, 2)) < 3


def test_given_documents_and_questions_are_asked_about() -> None:
    document = Document(tokens=list(range(5000)), questions=[[7, 7], [8, 8, 8]])
    asked = list(make_sessions(Workload(name="loogle", num_requests=10), [document]))
    for session in asked:
        (turn,) = session.turns
        question = [7, 7] if turn.tokens[-1] == 7 else [8, 8, 8]
        assert turn.tokens[-len(question) :] == question
        text = turn.tokens[: -len(question)]
        assert 1000 < len(text) < 2500
        assert text == document.tokens[: len(text)]


def test_all_agents_begin_with_the_same_examples() -> None:
    firsts = [session.turns[0].tokens for session in sessions_of("react")]
    assert {common(firsts[0], other) for other in firsts[1:]} <= {1940, 1941}


def test_documents_are_shared_by_as_many_sessions_as_asked_for() -> None:
    for num_shared in (2, 3):
        sessions = sessions_of("shared-documents", 30 * num_shared, num_shared=num_shared)
        starts = [tuple(session.turns[0].tokens[:500]) for session in sessions]
        assert {starts.count(start) for start in starts} == {num_shared}
        for session in sessions:
            prompts = [session.prompt([[7] * 10] * number) for number in range(5)]
            texts = {tuple(prompt[:1500]) for prompt in prompts}
            assert len(texts) == 1
            assert len({tuple(prompt) for prompt in prompts}) == 5  # five questions
            assert max(map(len, prompts)) < 2150 + 60 + 1  # nothing said before is in it


def test_prefixes_repeat_evenly_with_new_suffixes() -> None:
    lengths = PrefixLengths(prefix_len=20, suffix_len=10, num_prefixes=4, output_len=3)
    prompts = prompts_of(sessions_of("prefix-repetition", 40, prefixes=lengths))
    assert {len(prompt) for prompt in prompts} == {30}
    starts = [tuple(prompt[:20]) for prompt in prompts]
    assert sorted(starts.count(start) for start in set(starts)) == [10] * 4
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 40


def test_random_prompts_share_a_prefix_only_if_asked_to() -> None:
    lengths = RandomLengths(input_len=50, output_len=10, range_ratio=0.2, prefix_len=32)
    sessions = sessions_of("random", 50, random=lengths)
    prompts = prompts_of(sessions)
    assert {common(prompts[0], other) for other in prompts[1:]} <= {32, 33}
    assert min(map(len, prompts)) >= 72 < max(map(len, prompts)) <= 92
    outputs = {turn.output_length for session in sessions for turn in session.turns}
    assert min(outputs) >= 8 < max(outputs) <= 12


@given(
    scale=st.floats(0.05, 1),
    max_model_len=st.integers(2, 3000),
    max_input_len=st.integers(1, 3000),
    max_output_len=st.integers(1, 500),
    name=st.sampled_from(DRAWN),
)
def test_no_request_breaks_the_limits(
    scale: float, max_model_len: int, max_input_len: int, max_output_len: int, name: str
) -> None:
    limits = Limits(
        scale=scale,
        max_model_len=max_model_len,
        max_input_len=max_input_len,
        max_output_len=max_output_len,
    )
    for session in sessions_of(name, 12, limits=limits):
        length = 0
        for turn in session.turns:
            length = len(turn.tokens) + (0 if turn.alone else length)
            assert 0 < length <= max_input_len
            assert 0 < turn.output_length <= max_output_len
            length += turn.output_length
            assert length <= max_model_len


def test_scaling_keeps_the_shape() -> None:
    whole = sessions_of("sharegpt", 200)
    quarter = sessions_of("sharegpt", 200, limits=Limits(scale=0.25))
    for one, other in zip(whole, quarter, strict=True):
        for turn, short in zip(one.turns, other.turns, strict=True):
            assert short.tokens == turn.tokens[: len(short.tokens)]
            assert len(short.tokens) == max(1, round(len(turn.tokens) / 4))
            assert short.output_length == max(1, round(turn.output_length / 4))


def test_sessions_start_at_once_or_at_the_rate() -> None:
    assert {session.start for session in sessions_of("random", 20)} == {0.0}
    starts = [session.start for session in sessions_of("random", 2000, rate=5.0)]
    gaps = np.diff(starts)
    assert starts[0] == 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.15)  # as exponential gaps have it
    calm = [session.start for session in sessions_of("random", 2000, rate=5.0, burstiness=25.0)]
    assert np.diff(calm).std() == pytest.approx(0.04, rel=0.15)


def test_people_think_before_they_go_on_but_not_before_they_begin() -> None:
    sessions = sessions_of("sharegpt", 600, think_time=2.0)
    assert {session.turns[0].think_time for session in sessions} == {0.0}
    later = [turn.think_time for session in sessions for turn in session.turns[1:]]
    assert np.mean(later) == pytest.approx(2.0, rel=0.25)


@given(count=st.integers(0, 200), longer=st.integers(0, 200), key=st.integers(0, 2**40))
def test_a_shorter_text_of_a_key_begins_the_longer_one(count: int, longer: int, key: int) -> None:
    long = synthetic_tokens(VOCAB, count + longer, "text", key)
    assert synthetic_tokens(VOCAB, count, "text", key) == long[:count]
    if len(long) >= 16:
        assert synthetic_tokens(VOCAB, len(long), "text", key + 1)[:16] != long[:16]


def test_chats_of_a_file_are_joined_and_paired(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl.gz"
    records = [
        {"id": "a_0", "turns": [["gpt", 9], ["human", 10], ["gpt", 20], ["human", 3]]},
        {"id": "a_1", "turns": [["human", 4], ["gpt", 30], ["gpt", 5]]},
        {"id": "b_0", "turns": [["human", 1]]},
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    for session in sessions_of("sharegpt", 6, path=path):
        lengths = [(len(turn.tokens), turn.output_length) for turn in session.turns]
        assert lengths == [(10, 20), (7, 35)]


def test_a_trace_keeps_its_times_and_equal_blocks_are_equal_tokens(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    records = [
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 0, "input_length": 1536, "output_length": 6, "hash_ids": [0, 1, 2]},
        {"timestamp": 6000, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    sessions = sessions_of("timed-trace", 99, path=path, speedup=2.0)
    starts = [session.start for session in sessions]
    assert 0 <= starts[0] < starts[1] < 1.5
    assert 3 <= starts[2] < 4.5
    first, second, third = prompts_of(sessions)
    assert [len(first), len(second), len(third)] == [1000, 1536, 600]
    assert second[:1000] == first
    assert common(first, third) == 512
    scaled = sessions_of("timed-trace", 2, path=path, limits=Limits(scale=0.25))
    assert [len(prompt) for prompt in prompts_of(scaled)] == [250, 384]
    assert common(*prompts_of(scaled)) == 250


def test_mistakes_are_told_in_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a_0", "turns": [["human"]]}\n')
    backwards = tmp_path / "backwards.jsonl"
    lines = [
        {"timestamp": time, "input_length": 1, "output_length": 1, "hash_ids": [0]}
        for time in (3000, 0)
    ]
    backwards.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for make, said in (
        (lambda: sessions_of("poetry"), "no workload 'poetry'"),
        (lambda: sessions_of("timed-trace"), "needs the trace's file"),
        (lambda: sessions_of("random", rate=0.0), "rate must be positive"),
        (lambda: sessions_of("random", rate=math.nan), "rate must be positive"),
        (lambda: sessions_of("sharegpt", path=tmp_path / "none"), "can't read the workload"),
        (lambda: sessions_of("sharegpt", path=broken), "broken.jsonl, line 1"),
        (lambda: sessions_of("timed-trace", path=backwards), "line 2: goes back in time"),
        (lambda: Limits(max_model_len=1), "leaves no room"),
        (lambda: RandomLengths(range_ratio=1.0), r"must be in \[0, 1\)"),
    ):
        with pytest.raises(UsageError, match=said):
            make()
