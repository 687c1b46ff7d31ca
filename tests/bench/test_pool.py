"""The pool's benchmark runs and says what it measured; no figure is judged."""

from memserve.bench.pool import Move, parse_options, render, run


def test_the_report_names_every_call_and_counts_the_copies() -> None:
    shape = ["--layers", "2", "--kv-heads", "1", "--head-dim", "8", "--rounds", "1"]
    report = run(parse_options(shape))
    assert all(figure.value > 0 for figure in report.figures)
    calls = {move.granularity: move.calls for move in report.moves}
    assert calls == {"layer": 2 * 2 * 128, "request": 128, "chunk": 128}
    table = render(report)
    assert all(figure.name in table for figure in report.figures)
    assert all(isinstance(move, Move) and move.granularity in table for move in report.moves)
