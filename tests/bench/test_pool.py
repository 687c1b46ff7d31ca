"""The pool's benchmark runs and says what it measured; no figure is judged."""

from pathlib import Path

from memserve.bench.pool import Move, parse_options, render, run
from memserve.bench.tiers import PLACES, measure_first_tokens
from tests.model.tiny import ARCHITECTURES, save


def test_the_report_names_every_call_and_counts_the_copies() -> None:
    shape = ["--layers", "2", "--kv-heads", "1", "--head-dim", "8", "--rounds", "1"]
    report = run(parse_options(shape))
    assert all(figure.value > 0 for figure in report.figures)
    calls = {move.granularity: move.calls for move in report.moves}
    assert calls == {"layer": 2 * 2 * 128, "request": 128, "chunk": 128}
    assert {(swap.encoding, swap.to) for swap in report.swaps} == {
        (encoding, tier) for encoding in ("plain", "int8") for tier in ("HBM", "DRAM")
    }
    assert all(swap.milliseconds > 0 for swap in report.swaps)
    table = render(report)
    assert all(figure.name in table for figure in report.figures)
    assert all(isinstance(move, Move) and move.granularity in table for move in report.moves)


def test_first_tokens_of_prompts_that_each_tier_holds_are_timed_by_a_real_engine(
    tmp_path: Path,
) -> None:
    folder = save(ARCHITECTURES["llama"].config(), tmp_path)
    first = measure_first_tokens(folder, "float32", [32, 64], 1, tmp_path)
    assert not [*tmp_path.glob("bench-pool-*")]
    assert [(row.prompt_tokens, row.history) for row in first] == [
        (length + 1, history) for length in (32, 64) for history in ("none", *PLACES)
    ]
    assert all(row.milliseconds > 0 for row in first)
    assert [row.share_of_uncached for row in first if row.history == "none"] == [1.0, 1.0]
