"""The layout table's verdicts."""

import pytest

from memserve.sim.grid import CellResult, GridReport, render_grid


def report(*cells: tuple[dict[str, float], float]) -> GridReport:
    results = [
        CellResult(cell=f"cell {i}", num_instances=2, fixed=fixed, cost=cost)
        for i, (fixed, cost) in enumerate(cells)
    ]
    return GridReport(profile="test", num_requests=1, seed=0, cells=results)


def test_a_layouts_margin_is_over_the_best_other_one() -> None:
    found = report(({"2M": 1.0, "1P1D": 1.2}, 1.0), ({"2M": 2.0, "1P1D": 1.0}, 1.0))
    assert found.best_margins() == pytest.approx({"2M": 1.2, "1P1D": 2.0})


def test_cost_fails_in_cells_beyond_the_tolerance() -> None:
    found = report(({"2M": 1.0, "1P1D": 1.2}, 1.04), ({"2M": 2.0, "1P1D": 1.0}, 1.06))
    assert found.failures() == ["cell 1"]
    assert found.failures("2M") == ["cell 1"]
    assert found.failures("1P1D") == ["cell 0"]


def test_shares_are_geometric_means_over_a_layouts_cells() -> None:
    found = report(({"2M": 2.0, "3M": 9.0}, 1.0), ({"2M": 1.0, "1P1D": 4.0}, 2.0))
    assert found.shares() == pytest.approx({"2M": 1.0, "3M": 1 / 9, "1P1D": 0.5})
    assert "cost is beyond 1.05 in 1 of 2 cells" in render_grid(found)
