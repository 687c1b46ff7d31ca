"""Sequences that share blocks, in the kernel for long chunks: the same bits as each one alone."""

import ctypes
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.model.attention.native import (
    Kernels,
    PrefillOperands,
    block_offsets,
    load_kernels,
    native_step,
)
from memserve.model.attention.paged import PagedAttention
from tests.model.prefill_cases import (
    DTYPES,
    LAYER,
    LAYERS,
    Case,
    assert_near,
    build,
    prefill,
)

DOCUMENT = (320, 20)
"""Context and new tokens of the sequence that others share blocks of."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    assert loaded is not None, "the tests need a C++ compiler"
    return loaded


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Draw:
    """A step whose sequences share blocks, and how it is laid out."""

    spans: list[tuple[int, int]]
    shared: list[tuple[int, int]]
    block_size: int
    dtype: str
    head_dim: int
    group: int
    kv_heads: int
    window: int | None
    is_tight: bool

    def build(self) -> Case:
        """The step, filled with random numbers."""
        return build(
            self.spans,
            shared=self.shared,
            dtype=self.dtype,
            group=self.group,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            window=self.window,
        )


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Sequences that share none, some or all full blocks of earlier ones, which share them in turn."""
    block_size = draw(st.sampled_from([1, 16, 24, 48, 64, 128]))
    spans: list[tuple[int, int]] = []
    shared: list[tuple[int, int]] = []
    for row in range(draw(st.integers(1, 9))):
        source = draw(st.integers(0, max(0, row - 1)))
        full = sum(spans[source]) // block_size if row else 0
        count = draw(st.one_of(st.just(full), st.integers(0, full)))
        context = count * block_size + draw(st.integers(0, 150))
        spans.append((context, draw(st.sampled_from([1, 1, 2, 5, 17, 40, 75]))))
        shared.append((source, count))
    return Draw(
        spans,
        shared,
        block_size,
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        head_dim=draw(st.sampled_from([24, 64])),
        group=draw(st.sampled_from([1, 3, 8])),
        kv_heads=draw(st.integers(1, 3)),
        window=draw(st.sampled_from([None, None, 7, 64, 130])),
        is_tight=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(drawn=draws())
def test_sequences_together_have_the_bits_of_each_alone(kernels: Kernels, drawn: Draw) -> None:
    case = drawn.build()
    together = prefill(case, kernels, drawn.window, is_tight=drawn.is_tight)
    assert_near(together, case.want)
    bounds = case.step.query_start.tolist()
    for sequence, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = prefill(case, kernels, drawn.window, only=[sequence])
        assert torch.equal(together[begin:end], alone[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_new", [1, 40])
def test_threads_change_nothing(kernels: Kernels, threads: int, dtype: str, num_new: int) -> None:
    assert threads
    spans = [DOCUMENT, *[(320 + 3 * i, num_new) for i in range(7)]]
    case = build(spans, shared=[(0, 20)] * 8, dtype=dtype)
    together = prefill(case, kernels)
    assert_near(together, case.want)
    for sequence in range(8):
        alone = prefill(case, kernels, only=[sequence])
        is_computed = ~alone.isnan()
        assert bool(is_computed.any())
        assert torch.equal(together[is_computed], alone[is_computed])


def claimed(case: Case, kernels: Kernels, marked: tuple[int, ...] = ()) -> list[int]:
    """The sequences that the kernel takes, the marked ones among them."""
    if kernels.prefill_operands == PrefillOperands.NONE:
        pytest.skip("this CPU has no AVX-512")
    offsets = block_offsets(case.step, case.arena)
    native = native_step(case.step, case.arena, offsets, case.query.shape[1])
    flags = torch.zeros(native.num_sequences, dtype=torch.bool)
    flags[list(marked)] = True
    kernels.prefill_claim(ctypes.pointer(native), flags.data_ptr())
    found: list[int] = flags.nonzero().flatten().tolist()
    return found


def test_rows_that_share_a_long_context_are_claimed_and_others_are_not(kernels: Kernels) -> None:
    answers = [(660 + i, 1) for i in range(8)]
    apart = build(answers)
    assert claimed(apart, kernels) == []
    assert claimed(apart, kernels, marked=(3,)) == [3]
    together = build(answers, shared=[(0, 40)] * 8)
    assert claimed(together, kernels) == list(range(8))
    few = build(answers, shared=[(0, 40)] * 3 + [(i, 0) for i in range(3, 8)])
    assert claimed(few, kernels) == []
    barely = build(answers, shared=[(0, 8)] * 8)
    assert claimed(barely, kernels) == []


def test_each_document_is_judged_by_its_own_readers(kernels: Kernels) -> None:
    # Two documents of 40 blocks: 8 answers about the first, 2 about the second, in turns at first.
    owners = [0, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    case = build([(660 + i, 1) for i in range(10)], shared=[(owner, 40) for owner in owners])
    assert claimed(case, kernels) == [0, 2, 4, 5, 6, 7, 8, 9]


def test_answers_about_one_document_are_attended_over_tiles(kernels: Kernels, threads: int) -> None:
    assert threads
    spans = [(320 + i, 1) for i in range(9)] + [(90, 1), (0, 50)]
    shared = [(0, 20)] * 9 + [(9, 0), (10, 0)]
    case = build(spans, shared=shared)
    attention = PagedAttention(kernels, num_query_heads=6, windows=[None] * LAYERS)
    output = torch.full_like(case.query, math.nan)
    batch = attention.begin(case.step, case.arena)
    batch.attend(LAYER, case.query.flatten(1), output.flatten(1), scale=case.scale, window=None)
    assert_near(output, case.want)
    if attention.long_chunks == "amx":
        assert torch.equal(output[:9], prefill(case, kernels, only=range(9))[:9])
