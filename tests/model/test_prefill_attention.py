"""The kernel for long chunks against attention written out plainly in float32."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from memserve.model.attention.native import Kernels, PrefillOperands, load_kernels
from memserve.model.attention.paged import PagedAttention
from tests.model.prefill_cases import (
    DTYPES,
    LAYER,
    LAYERS,
    Case,
    assert_near,
    build,
    plain,
    prefill,
)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    assert loaded is not None, "the tests need a C++ compiler"
    return loaded


@pytest.fixture(scope="module")
def kernels_without_amx() -> Kernels:
    loaded = load_kernels(("-mno-amx-tile", "-mno-amx-bf16"))
    if loaded is None:
        pytest.skip("this compiler has no AMX to leave out")
    return loaded


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_group_and_head_size_equals_the_plain_formula(
    kernels: Kernels, threads: int, dtype: str, group: int, head_dim: int
) -> None:
    assert threads
    spans = [(0, 40), (100, 17), (37, 150)]
    case = build(spans, dtype=dtype, group=group, head_dim=head_dim)
    assert_near(prefill(case, kernels), case.want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 80, 256])
def test_head_sizes_that_fill_no_tile_are_padded(
    kernels: Kernels, dtype: str, head_dim: int
) -> None:
    case = build([(30, 70), (0, 16)], dtype=dtype, head_dim=head_dim)
    assert_near(prefill(case, kernels), case.want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 16, 48, 128])
@pytest.mark.parametrize("context", [0, 1, 15, 16, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128])
def test_contexts_end_anywhere_in_blocks_and_tiles(
    kernels: Kernels, dtype: str, block_size: int, context: int
) -> None:
    spans = [(context, 16), (context, 21), (context, 22), (context, 64)]
    case = build(spans, dtype=dtype, block_size=block_size, kv_heads=1)
    assert_near(prefill(case, kernels), case.want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("span", [(0, 600), (2000, 16), (1999, 333), (511, 512)])
def test_long_chunks_and_contexts_equal_the_plain_formula(
    kernels: Kernels, threads: int, dtype: str, span: tuple[int, int]
) -> None:
    assert threads
    case = build([span], dtype=dtype)
    assert_near(prefill(case, kernels), case.want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 16, 31, 32, 63, 64, 65, 100, 1000])
def test_a_window_hides_exactly_what_lies_before_it(
    kernels: Kernels, threads: int, dtype: str, window: int
) -> None:
    assert threads
    case = build([(0, 130), (300, 70), (63, 20)], dtype=dtype, window=window)
    assert_near(prefill(case, kernels, window), case.want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_a_single_token_at_any_place_survives(kernels: Kernels, dtype: str) -> None:
    # Scores differ by hundreds: the running maximum moves, and old results vanish.
    case = build([(200, 100)], dtype=dtype, spread=60.0)
    assert_near(prefill(case, kernels), case.want)


def test_scores_that_only_grow_are_rescaled_without_loss(kernels: Kernels) -> None:
    # Each key scores a little more than the one before it, across many tiles.
    case = build([(300, 64)], dtype="float32", group=1, kv_heads=1, head_dim=32)
    length, positions = 364, torch.arange(364)
    keys = (positions / 10.0)[:, None].expand(length, 32).contiguous()
    blocks = case.step.block_table[0, positions // 16].long()
    case.arena[blocks, LAYER, 0, positions % 16, 0] = keys
    case.query[:] = 1.0
    values = case.arena[blocks, LAYER, 1, positions % 16]
    want = plain(case.query, keys[:, None], values, case.scale, None)
    assert_near(prefill(case, kernels), want)


def test_contexts_larger_than_the_scratch_memory_take_turns(kernels: Kernels) -> None:
    # 4 KV heads of about 3.1 MiB each, or 1.6 in bfloat16, into 4 MiB.
    for dtype in DTYPES:
        case = build([(1500, 20), (10, 30)], dtype=dtype, kv_heads=4, group=1, head_dim=256)
        assert_near(prefill(case, kernels), case.want)


def sliced(case: Case, spans: list[tuple[int, int]]) -> Case:
    """Slices of the one sequence that a case computes from its first token on, all in its arena."""
    counts = torch.tensor([0] + [end - start for start, end in spans])
    rows = torch.cat([torch.arange(start, end) for start, end in spans])
    step = dataclasses.replace(
        case.step,
        token_ids=torch.zeros(len(rows), dtype=torch.int64),
        positions=rows,
        query_start=counts.cumsum(0).int(),
        kv_len=torch.tensor([end for _, end in spans], dtype=torch.int32),
        block_table=case.step.block_table.repeat(len(spans), 1),
    )
    return Case(step, case.arena, case.query[rows], case.want[rows], case.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 16), (48, 64)],
        [(100, 131), (131, 170), (400, 431)],
        [(5, 300), (290, 299), (0, 17)],
        [(590, 600), (591, 600)],
    ],
)
def test_slices_of_one_sequence_see_their_own_parts_of_its_context(
    kernels: Kernels, threads: int, dtype: str, window: int | None, spans: list[tuple[int, int]]
) -> None:
    assert threads
    case = sliced(build([(0, 600)], dtype=dtype, window=window), spans)
    assert_near(prefill(case, kernels, window), case.want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_chunks_packed_with_decode_rows_and_short_ones_equal_the_plain_formula(
    kernels: Kernels, threads: int, dtype: str
) -> None:
    assert threads
    spans = [(90, 1), (0, 200), (33, 3), (700, 1), (64, 16), (5, 40), (129, 5)]
    case = build(spans, dtype=dtype)
    attention = PagedAttention(kernels, num_query_heads=6, windows=[None] * LAYERS)
    output = torch.full_like(case.query, math.nan)
    batch = attention.begin(case.step, case.arena)
    batch.attend(LAYER, case.query.flatten(1), output.flatten(1), scale=case.scale, window=None)
    assert_near(output, case.want)


def test_rows_are_read_and_written_with_their_strides(kernels: Kernels) -> None:
    # The fused path passes queries as columns of the joint projection.
    case = build([(20, 50)])
    width = case.query[0].numel()
    joint = torch.full((50, width + 96), math.nan, dtype=torch.bfloat16)
    joint[:, :width] = case.query.flatten(1)
    attention = PagedAttention(kernels, num_query_heads=6, windows=[None] * LAYERS)
    output = torch.full((50, width), math.nan, dtype=torch.bfloat16)
    batch = attention.begin(case.step, case.arena)
    batch.attend(LAYER, joint[:, :width], output, scale=case.scale, window=None)
    assert_near(output.view_as(case.want), case.want)
    assert bool(joint[:, width:].isnan().all())


@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("window", [None, 50])
def test_a_bfloat16_arena_is_served_without_matrix_tiles(
    kernels_without_amx: Kernels, window: int | None, head_dim: int
) -> None:
    assert kernels_without_amx.prefill_operands != PrefillOperands.BFLOAT16
    case = build([(100, 90), (0, 33)], head_dim=head_dim, window=window)
    assert_near(prefill(case, kernels_without_amx, window), case.want)


def test_a_cpu_without_avx512_serves_long_chunks_by_gathering(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    monkeypatch.setattr(kernels, "prefill_operands", PrefillOperands.NONE)
    monkeypatch.setattr(kernels, "prefill", None)
    case = build([(100, 90), (20, 1), (0, 33)])
    attention = PagedAttention(kernels, num_query_heads=6, windows=[None] * LAYERS)
    assert attention.long_chunks == "sdpa"
    output = torch.full_like(case.query, math.nan)
    batch = attention.begin(case.step, case.arena)
    batch.attend(LAYER, case.query.flatten(1), output.flatten(1), scale=case.scale, window=None)
    assert_near(output, case.want)


def test_a_mistake_of_one_token_exceeds_the_tolerance() -> None:
    """What the comparisons above must be able to see, in the coarser dtype."""
    case = build([(30, 100)], window=64)
    off_by_one = build([(30, 100)], window=63)
    assert torch.equal(case.query, off_by_one.query)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(off_by_one.want.bfloat16(), case.want)
