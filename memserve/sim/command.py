"""The flags of `memserve simulate`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from memserve.errors import UsageError
from memserve.scheduler.interface import ContextCaching, FetchPolicy, RoutingPolicy, SloAdmission
from memserve.sim.costs import builtin_profiles
from memserve.sim.experiment import SimulateOptions, choose_profile, simulate_all
from memserve.sim.grid import GRID, HELD_OUT, Cell, CellResult, render_grid, run_grid
from memserve.sim.plot import plot, require_plotting
from memserve.sim.routing import render_routing, routing_table
from memserve.sim.table import render
from memserve.sim.validation import read_run, render_validation
from memserve.sim.validation import validate as run_validation
from memserve.workloads import NAMES, Limits

FILE = click.Path(path_type=Path, dir_okay=False)


def _numbers(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is no list of numbers: write it as 1,2,4") from None


def _names(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


FLAGS: tuple[Callable[[Callable[..., None]], Callable[..., None]], ...] = (
    click.option(
        "--workload",
        type=click.Choice([name for name in NAMES if name != "timed-trace"]),
        default="sharegpt",
        help="What to play.",
    ),
    click.option("--trace", type=FILE, help="Play a timed trace or a block trace instead."),
    click.option("--num-requests", type=click.IntRange(min=1), default=500, help="At most."),
    click.option(
        "--rate",
        "rates",
        callback=_numbers,
        default="1",
        help="Sessions started per second, several by commas; speeds up a timed trace.",
    ),
    click.option("--instances", type=click.IntRange(min=1), help="So many mixed instances."),
    click.option(
        "--layout",
        "layouts",
        callback=_names,
        default="2M",
        help="Roles at start, as 1P1D, 2P1D1M or 3M; several by commas.",
    ),
    click.option(
        "--policy",
        "policies",
        callback=_names,
        default="cost",
        help=f"Of {', '.join(get_args(RoutingPolicy))}; several by commas.",
    ),
    click.option(
        "--elastic-roles/--fixed-roles", default=True, help="Whether cost may change roles."
    ),
    click.option(
        "--context-caching",
        type=click.Choice(get_args(ContextCaching)),
        default="3",
        help="As serve.",
    ),
    click.option(
        "--fetch-policy", type=click.Choice(get_args(FetchPolicy)), default="cost", help="As serve."
    ),
    click.option("--max-sp", type=click.IntRange(min=0), default=1, help="As serve."),
    click.option("--sp-min-tokens", type=click.IntRange(min=1), default=512, help="As serve."),
    click.option(
        "--slo-ttft", type=click.FloatRange(min=0, min_open=True), help="As serve, milliseconds."
    ),
    click.option(
        "--slo-tpot", type=click.FloatRange(min=0, min_open=True), help="As serve, milliseconds."
    ),
    click.option(
        "--slo-admission",
        type=click.Choice(get_args(SloAdmission)),
        default="none",
        help="As serve; a session that is turned away does not come back.",
    ),
    click.option("--block-size", type=click.IntRange(min=1), default=16, help="Tokens in a block."),
    click.option(
        "--profile",
        type=click.Choice(list(builtin_profiles())),
        default="cpu-demo",
        help="Machine.",
    ),
    click.option("--cost-model", type=FILE, help="JSON of a profile of your own."),
    click.option(
        "--engine-report", type=FILE, help="JSON of scripts/bench_engine: measured steps."
    ),
    click.option(
        "--threads", "num_threads", type=int, default=1, help="Which worker of that report."
    ),
    click.option("--devices", "num_devices", type=int, help="Shared by the instances in turn."),
    click.option(
        "--contention",
        type=click.FloatRange(min=0),
        help="What each busy neighbour on a device adds to a step's time, as a share.",
    ),
    click.option("--noise", type=click.FloatRange(min=0), help="Of step times, as a share."),
    click.option("--max-model-len", type=int, help="Longest prompt plus answer."),
    click.option("--seed", type=int, default=0, help="Of requests and noise."),
    click.option("--grid", is_flag=True, help="The layout table: every fixed layout against cost."),
    click.option(
        "--held-out", is_flag=True, help="With --grid: cells that the policy was not tuned on."
    ),
    click.option("--routing", is_flag=True, help="The routing table, after the paper's Fig 15."),
    click.option("--validate", type=FILE, help="Compare with a result of `memserve bench serve`."),
    click.option("--save-result", type=FILE, help="JSON file for the report."),
    click.option("--plot", "picture", type=FILE, help="PNG or SVG: TTFT, hit rate, load by rate."),
)


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of a simulation."""
    for flag in reversed(FLAGS):
        command = flag(command)
    return command


@click.command()
@flags
def simulate(
    *,
    instances: int | None,
    layouts: tuple[str, ...],
    policies: tuple[str, ...],
    max_model_len: int | None,
    save_result: Path | None,
    picture: Path | None,
    grid: bool,
    held_out: bool,
    routing: bool,
    validate: Path | None,
    **values: Any,  # noqa: ANN401
) -> None:
    """Play a workload on simulated instances, under the scheduler that serves.

    Prints a table and then one JSON line. Virtual time: equal flags give equal figures.
    """
    for policy in policies:
        if policy not in get_args(RoutingPolicy):
            raise UsageError(
                f"no policy {policy!r}: there are {', '.join(get_args(RoutingPolicy))}"
            )
    if picture is not None:
        require_plotting(picture)
    options = SimulateOptions(
        layouts=layouts if instances is None else (f"{instances}M",),
        policies=tuple(msgspec.convert(policies, tuple[RoutingPolicy, ...])),
        limits=Limits(max_model_len=max_model_len),
        **values,
    )
    if grid:
        cells = HELD_OUT if held_out else GRID
        text, result = _grid(options, cells)
    elif routing:
        text, result = _routing(options)
    elif validate is not None:
        text, result = _validation(options, validate)
    else:
        report = simulate_all(options)
        text, result = render(report), report
        if picture is not None:
            plot(report, picture)
    encoded = msgspec.json.encode(result)
    if save_result is not None:
        save_result.write_bytes(encoded + b"\n")
    click.echo(text)
    click.echo()
    click.echo(encoded.decode())


def _grid(options: SimulateOptions, cells: Sequence[Cell]) -> tuple[str, object]:
    def progress(cell: CellResult) -> None:
        click.echo(f"{cell.cell}: cost {cell.cost / cell.best:.2f}", err=True)

    report = run_grid(
        cells,
        num_requests=options.num_requests,
        seed=options.seed,
        progress=progress,
    )
    return render_grid(report), report


def _routing(options: SimulateOptions) -> tuple[str, object]:
    rows = routing_table(options, choose_profile(options), rate=options.rates[0])
    return render_routing(rows), rows


def _validation(options: SimulateOptions, path: Path) -> tuple[str, object]:
    (layout, *_), (policy, *_) = options.layouts, options.policies
    found = run_validation(read_run(path), options, choose_profile(options), layout, policy)
    return render_validation(found), found
