"""A simulation's report as a picture: TTFT, hit rate and load against the rate."""

from pathlib import Path
from typing import Protocol

from memserve.errors import UsageError
from memserve.sim.experiment import Report
from memserve.sim.outcome import Figures


class Measure(Protocol):
    """One figure of a run."""

    def __call__(self, figures: Figures) -> float:
        """The value to draw."""
        ...


PANELS: tuple[tuple[str, Measure], ...] = (
    ("mean TTFT, ms", lambda figures: figures.ttft_mean * 1e3),
    ("mean JCT, s", lambda figures: figures.jct_mean),
    ("hit rate", lambda figures: figures.hit_rate),
    ("load: share of time in steps", lambda f: sum(f.utilisation) / len(f.utilisation)),
)


def require_plotting(path: Path) -> None:
    """Raises `UsageError` for a file that is no picture, and where matplotlib isn't installed."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"a plot is a .png or a .svg, not {path.name}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'memserve[plot]'") from None


def plot(report: Report, path: Path) -> None:
    """Write a PNG or SVG with one line for each layout and policy; see `require_plotting`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flat
    lines = sorted({(run.layout, run.policy) for run in report.runs})
    for axis, (title, measure) in zip(axes, PANELS, strict=True):
        for layout, policy in lines:
            runs = [run for run in report.runs if (run.layout, run.policy) == (layout, policy)]
            points = sorted((run.rate, measure(run.figures)) for run in runs)
            rates, values = zip(*points, strict=True)
            axis.plot(rates, values, marker="o", label=f"{layout} {policy}")
        axis.set_title(title)
        axis.set_xlabel("sessions started per second")
        axis.set_ylim(bottom=0)
    axes = figure.axes
    axes[0].legend()
    figure.suptitle(f"{report.workload} on {report.profile.name} (simulated)")
    figure.savefig(path)
