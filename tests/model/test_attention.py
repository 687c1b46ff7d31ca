"""The CPU attention kernels, compiled and in torch, against attention written out plainly."""

import ctypes
import dataclasses
import math
from pathlib import Path

import pytest
import torch

from memserve.errors import UnsupportedModel
from memserve.model.attention.native import Kernels, load_kernels
from memserve.model.attention.paged import LONG_CHUNK, PagedAttention, PagedBatch
from tests.model.attention_cases import LAYER, LAYERS, Problem, expected, problem


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    assert loaded is not None, "the tests need a C++ compiler"
    return loaded


def attend(
    task: Problem, kernels: Kernels | None, scale: float, window: int | None
) -> torch.Tensor:
    """Write the step's K and V through the code under test, attend, and return [T, Hq, D]."""
    heads = task.query.shape[1]
    attention = PagedAttention(kernels, num_query_heads=heads, windows=[window] * LAYERS)
    batch: PagedBatch = attention.begin(task.step, task.arena)
    new_keys = [k[c:] for k, (c, _) in zip(task.keys, task.spans, strict=True)]
    new_values = [v[c:] for v, (c, _) in zip(task.values, task.spans, strict=True)]
    batch.write(LAYER, torch.cat(new_keys), torch.cat(new_values))
    output = torch.full_like(task.query, math.nan)
    batch.attend(LAYER, task.query.flatten(1), output.flatten(1), scale=scale, window=window)
    return output


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).abs().max().item()
    limit = 1e-5 if got.dtype == torch.float32 else 2e-2
    assert error <= limit, f"off by {error:.2g}"


DECODES = [(0, 1), (3, 1), (4, 1), (31, 1), (32, 1), (33, 1), (100, 1), (700, 1)]
CHUNKS = [(0, 5), (7, 3), (0, LONG_CHUNK), (30, LONG_CHUNK - 1), (9, LONG_CHUNK + 4), (64, 1)]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group", [1, 3, 8, 20])
@pytest.mark.parametrize("spans", [DECODES, CHUNKS], ids=["decode", "chunks"])
def test_attention_equals_the_plain_formula_for_every_group_size(
    kernels: Kernels,
    compiled: bool,
    dtype: torch.dtype,
    group: int,
    spans: list[tuple[int, int]],
) -> None:
    task = problem(spans, group=group, dtype=dtype)
    got = attend(task, kernels if compiled else None, 0.125, None)
    assert_near(got, expected(task, 0.125, None)[0])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
def test_attention_equals_the_plain_formula_for_every_head_size(
    kernels: Kernels,
    compiled: bool,
    dtype: torch.dtype,
    head_dim: int,
) -> None:
    task = problem([(40, 1), (5, 6), (3, 20)], head_dim=head_dim, dtype=dtype, block_size=16)
    scale = head_dim**-0.5
    got = attend(task, kernels if compiled else None, scale, None)
    assert_near(got, expected(task, scale, None)[0])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("window", [1, 4, 5, 31, 32, 33, 1000])
def test_a_window_hides_exactly_what_lies_before_it(
    kernels: Kernels,
    compiled: bool,
    window: int,
) -> None:
    task = problem(DECODES + CHUNKS)
    got = attend(task, kernels if compiled else None, 0.2, window)
    assert_near(got, expected(task, 0.2, window)[0])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_context_split_among_threads_gives_the_same_and_its_log_sum_exp(
    kernels: Kernels, threads: int
) -> None:
    task = problem([(900, 1), (333, 2)])
    want, want_sums = expected(task, 0.125, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = attend(task, kernels, 0.125, None)
        heads = task.query.shape[1]
        batch = PagedAttention(kernels, num_query_heads=heads, windows=[None] * LAYERS).begin(
            task.step, task.arena
        )
        sums = torch.empty(task.query.shape[:2])
        both = torch.arange(2, dtype=torch.int32)
        stride = heads * task.query.shape[2]
        kernels.attend(
            *(batch.native_pointer, LAYER, task.query.data_ptr(), stride),
            *(output.data_ptr(), stride, sums.data_ptr(), ctypes.c_float(0.125), 0),
            *(both.data_ptr(), 2),
        )
    finally:
        torch.set_num_threads(before)
    assert_near(output, want)
    assert (sums - want_sums).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_in_other_arenas_are_attended_to_where_they_lie(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    """What the step writes is in the own arena, and of the rest every second block in another."""
    spans = [(64, 1), (700, 1), (40, 5), (32, LONG_CHUNK + 4), (128, 40)]
    task = problem(spans, dtype=dtype, block_size=4)
    numbers = task.step.block_table.long()
    other = task.arena.clone()
    distance = (other.data_ptr() - task.arena.data_ptr()) // other.element_size()
    far = torch.zeros_like(numbers, dtype=torch.bool)
    for row, (context, _) in enumerate(spans):
        far[row, : context // 4 : 2] = True
    task.arena[numbers[far]] = math.nan
    offsets = numbers * task.arena.stride(0) + far * distance
    task.step = dataclasses.replace(task.step, offsets=offsets)
    got = attend(task, kernels, 0.125, None)
    assert_near(got, expected(task, 0.125, None)[0])


def test_without_kernels_blocks_in_other_arenas_are_refused() -> None:
    task = problem([(8, 1)])
    task.step = dataclasses.replace(task.step, offsets=task.step.block_table.long())
    with pytest.raises(UnsupportedModel, match="kernels"):
        attend(task, None, 0.125, None)


def test_a_step_writes_its_own_slots_and_no_others(kernels: Kernels) -> None:
    for chosen in (kernels, None):
        task = problem([(3, 4), (0, 2)])
        before = task.arena.clone()
        attend(task, chosen, 1.0, None)
        changed = (task.arena != before) & ~(task.arena.isnan() & before.isnan())
        assert changed[:, 0].sum() == 0
        assert changed.sum() == 6 * 2 * task.keys[0][0].numel()


def test_there_is_one_openmp_runtime_in_the_process(kernels: Kernels) -> None:
    assert kernels is not None
    mapped = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line
    }
    assert len(mapped) == 1
