"""The benchmark of the scheduler, made small."""

import msgspec

from memserve.bench.scheduler import Options, SchedulerReport, render, run


def test_the_report_has_every_decision_and_survives_json() -> None:
    options = Options(num_blocks=500, instances=(2, 3), tokens=(64, 128), rounds=2)
    report = run(options)
    assert [(d.num_instances, d.num_tokens) for d in report.decisions] == [
        (2, 64),
        (2, 128),
        (3, 64),
        (3, 128),
    ]
    assert all(0 < decision.place <= decision.whole for decision in report.decisions)
    assert 64 < report.bytes_per_block < 400
    assert msgspec.json.decode(msgspec.json.encode(report), type=SchedulerReport) == report
    assert len(render(report).splitlines()) == 4 + len(report.decisions)
