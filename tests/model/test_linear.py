"""Linear layers: every kernel computes what float32 does, to bfloat16's rounding."""

import logging

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import nn

from memserve.model.attention.native import Kernels, load_kernels
from memserve.model.layer_ops import NativeLayerOps
from memserve.model.linear import Kind, Linear, Linears, TiledLinear, choose_linears

ROUNDING = 2**-8
"""Of a bfloat16 rounded to nearest, relative."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    assert loaded is not None
    return loaded


@pytest.fixture(params=list(Kind), ids=lambda kind: kind.name.lower())
def linears(request: pytest.FixtureRequest, kernels: Kernels) -> Linears:
    kind: Kind = request.param
    if kind is Kind.TILES and not kernels.has_matmul:
        pytest.skip("this machine has no AMX for bfloat16, or the system refuses it")
    if kind is Kind.ONEDNN and not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this torch has no packed linear layers")
    return Linears(kernels, kind)


@pytest.fixture
def tiles(kernels: Kernels) -> Linears:
    if not kernels.has_matmul:
        pytest.skip("this machine has no AMX for bfloat16, or the system refuses it")
    return Linears(kernels, Kind.TILES)


def layer(num_inputs: int, num_outputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(num_inputs * 1000 + num_outputs)
    return nn.Linear(num_inputs, num_outputs, bias=bias, dtype=torch.bfloat16)


def rows_of(count: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, width, generator=generator).bfloat16()


def in_float(layers: list[nn.Linear], rows: torch.Tensor) -> list[torch.Tensor]:
    return [
        F.linear(
            rows.float(),
            each.weight.data.float().clone(),
            None if each.bias is None else each.bias.data.float(),
        )
        for each in layers
    ]


def assert_rounded(got: torch.Tensor, want: torch.Tensor, *, steps: int = 1) -> None:
    """Equal but for the final rounding and the order of a float sum."""
    assert got.dtype == torch.bfloat16
    assert got.shape == want.shape
    torch.testing.assert_close(got.float(), want, rtol=steps * ROUNDING, atol=1e-4)


SHAPES = [(32, 16), (64, 33), (40, 37), (8, 1), (100, 72), (576, 96), (1000, 130)]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_any_number_of_rows_of_any_size_is_multiplied(
    linears: Linears, num_inputs: int, num_outputs: int, bias: bool
) -> None:
    given = layer(num_inputs, num_outputs, bias=bias)
    inputs = [rows_of(count, num_inputs) for count in (1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 70)]
    wanted = [in_float([given], rows)[0] for rows in inputs]
    multiply = linears.stack([given])
    for rows, want in zip(inputs, wanted, strict=True):
        assert_rounded(multiply(rows), want)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1536, 200), (1530, 96)])
def test_more_rows_than_fit_the_cache_are_multiplied_in_passes(
    linears: Linears, num_inputs: int, num_outputs: int, num_threads: int
) -> None:
    given = layer(num_inputs, num_outputs, bias=True)
    rows = rows_of(715, num_inputs)
    (want,) = in_float([given], rows)
    multiply = linears.stack([given])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        got = [multiply(rows) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for result in got:
        assert_rounded(result, want)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("num_rows", [1, 20, 77])
def test_stacked_layers_stand_side_by_side(linears: Linears, num_rows: int, bias: bool) -> None:
    given = [layer(72, size, bias=bias) for size in (24, 8, 9)]
    rows = rows_of(num_rows, 72)
    want = torch.cat(in_float(given, rows), dim=-1)
    assert_rounded(linears.stack(given)(rows), want)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("num_outputs", [16, 24, 48, 100])
def test_gate_and_up_are_multiplied_and_joined(
    linears: Linears, kernels: Kernels, num_outputs: int, bias: bool
) -> None:
    gate, up = layer(72, num_outputs, bias=bias), layer(72, num_outputs, bias=bias)
    up.weight.data.neg_()
    inputs = [rows_of(count, 72) * 2 for count in (1, 16, 31, 70)]
    wanted = []
    for rows in inputs:
        a, b = in_float([gate, up], rows)
        wanted.append(F.silu(a) * b)
    multiply = linears.gate(gate, up, NativeLayerOps(kernels))
    for rows, want in zip(inputs, wanted, strict=True):
        # Where gate and up are rounded before they are joined, the roundings add up.
        assert_rounded(multiply(rows), want, steps=6)


def test_neighbouring_rows_do_not_leak_into_a_product(tiles: Linears) -> None:
    given = layer(40, 20)
    rows = rows_of(6, 40)
    rows[3] = torch.inf
    (want,) = in_float([given], rows_of(6, 40))
    got = tiles.stack([given])(rows)
    others = [0, 1, 2, 4, 5]
    assert_rounded(got[others], want[others])
    assert not got[3].isfinite().any()


def test_nan_and_infinity_come_through(tiles: Linears) -> None:
    given = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    given.weight.data = torch.eye(32, dtype=torch.bfloat16)
    multiply = tiles.stack([given])
    rows = torch.ones(2, 32, dtype=torch.bfloat16)
    rows[0, 5] = torch.nan
    assert multiply(rows)[0].isnan().all()
    assert multiply(rows)[1].eq(1).all()


def test_results_are_rounded_to_nearest_ties_to_even(tiles: Linears) -> None:
    given = nn.Linear(2, 4, bias=False, dtype=torch.bfloat16)
    # 1 + 2**-8 lies between two bfloat16, and 1 + 3 * 2**-8 between the next two.
    given.weight.data = torch.tensor(
        [[1, 2**-8], [1, 3 * 2**-8], [-1, -(2**-8)], [1, 2**-8 + 2**-12]]
    ).bfloat16()
    got = tiles.stack([given])(torch.ones(1, 2, dtype=torch.bfloat16))
    assert got.tolist() == [[1, 1 + 2**-6, -1, 1 + 2**-7]]


@pytest.mark.parametrize("shape", [(0, 64), (1, 0, 64), (2, 3, 64)])
def test_leading_sizes_are_kept(linears: Linears, shape: tuple[int, ...]) -> None:
    given = layer(64, 24)
    rows = rows_of(6, 64)[: torch.Size(shape[:-1]).numel()].view(shape)
    (want,) = in_float([given], rows)
    assert_rounded(linears.stack([given])(rows), want)


def test_rows_need_not_be_contiguous(tiles: Linears) -> None:
    given = layer(64, 24)
    rows = rows_of(5, 128)[:, 64:]
    (want,) = in_float([given], rows)
    assert_rounded(tiles.stack([given])(rows), want)


def test_rows_of_another_size_or_type_are_not_read(tiles: Linears) -> None:
    multiply = tiles.stack([layer(64, 24)])
    with pytest.raises(AssertionError):
        multiply(rows_of(1, 32))
    with pytest.raises(AssertionError):
        multiply(torch.zeros(1, 64))


def test_packing_takes_the_weights_away(linears: Linears, kernels: Kernels) -> None:
    given = [layer(64, 32) for _ in range(3)]
    linears.stack(given[:1])
    linears.gate(given[1], given[2], NativeLayerOps(kernels))
    assert [each.weight.numel() for each in given] == [0, 0, 0]


def test_a_module_keeps_computing_with_replaced_layers(linears: Linears) -> None:
    first, second = layer(64, 48, bias=True), nn.Linear(48, 8, dtype=torch.float32)
    rows = rows_of(3, 64)
    (want,) = in_float([first], rows)
    linears.replace(nn.Sequential(first, second))
    assert_rounded(first(rows), want)
    assert second.weight.numel() == 8 * 48


def kind_of(linear: Linear) -> str:
    return type(linear).__name__


def test_the_choice_follows_the_machine_and_the_type_and_is_logged(
    kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bfloat16 = choose_linears(kernels, torch.bfloat16).stack([layer(64, 16)])
    assert isinstance(bfloat16, TiledLinear) == kernels.has_matmul
    without = choose_linears(None, torch.bfloat16).stack([layer(64, 16)])
    assert kind_of(without) == "OneDnnLinear"
    float32 = choose_linears(kernels, torch.float32).stack([nn.Linear(64, 16)])
    assert kind_of(float32) == "PlainLinear"
    assert len(caplog.messages) == 3
    assert "oneDNN" in caplog.messages[1]
    assert "float32" in caplog.messages[2]
