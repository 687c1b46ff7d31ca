"""`memserve simulate`: one workload, or several rates of it, on layouts and under policies."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from memserve.errors import UsageError
from memserve.scheduler.interface import (
    ContextCaching,
    FetchPolicy,
    RoutingPolicy,
    SchedulerConfig,
    SloAdmission,
)
from memserve.sim.calibration import calibrated
from memserve.sim.cluster import Setting, simulate
from memserve.sim.costs import Profile, builtin_profiles, load_profile
from memserve.sim.dialogues import Dialogue, block_trace, is_block_trace, played
from memserve.sim.layouts import parse_layout
from memserve.sim.outcome import Figures
from memserve.workloads import Limits, Workload, make_sessions
from memserve.workloads.synthetic import RandomLengths


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What the command line says."""

    workload: str = "sharegpt"
    trace: Path | None = None
    """A timed trace or a block trace to play instead of a workload."""
    num_requests: int = 500
    rates: tuple[float, ...] = (1.0,)
    """Sessions that start in a second; a timed trace is played so many times as fast."""
    layouts: tuple[str, ...] = ("2M",)
    policies: tuple[RoutingPolicy, ...] = ("cost",)
    elastic_roles: bool = True
    context_caching: ContextCaching = "3"
    fetch_policy: FetchPolicy = "cost"
    max_sp: int = 1
    """As `--max-sp`: whether several instances may prefill a prompt together."""
    sp_min_tokens: int = 512
    slo_ttft: float | None = None
    """Milliseconds, as the next."""
    slo_tpot: float | None = None
    slo_admission: SloAdmission = "none"
    block_size: int = 16
    profile: str = "cpu-demo"
    cost_model: Path | None = None
    engine_report: Path | None = None
    """Of `scripts/bench_engine`; takes the place of the profile's steps."""
    num_threads: int = 1
    """Which worker of that report."""
    num_devices: int | None = None
    noise: float | None = None
    contention: float | None = None
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    random: RandomLengths = field(default_factory=RandomLengths)
    """Of the workload `random`."""
    max_tokens: int | None = None
    """What clients say their answers may have; None: exactly what they will have."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One simulation."""

    layout: str
    policy: str
    rate: float
    figures: Figures


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was simulated, and what came of it."""

    workload: str
    profile: Profile
    seed: int
    block_size: int
    context_caching: str
    runs: list[Run]
    seconds: float
    """Real time that the simulations took."""


def choose_profile(options: SimulateOptions) -> Profile:
    """The profile that the options name. Raises `UsageError` if there is none."""
    if options.cost_model is not None:
        profile = load_profile(options.cost_model)
    else:
        known = builtin_profiles()
        if options.profile not in known:
            raise UsageError(f"no profile {options.profile!r}: there are {', '.join(known)}")
        profile = known[options.profile]
    if options.engine_report is not None:
        profile = calibrated(options.engine_report, options.num_threads, profile)
    if options.noise is not None:
        profile = msgspec.structs.replace(profile, noise=options.noise)
    if options.contention is not None:
        profile = msgspec.structs.replace(profile, contention=options.contention)
    return profile


def dialogues(options: SimulateOptions, rate: float) -> Iterator[Dialogue]:
    """The requests of one simulation, the same for the same options and rate."""
    num, seed = options.num_requests, options.seed
    if options.trace is None:
        workload = Workload(
            name=options.workload,
            num_requests=num,
            rate=rate,
            seed=seed,
            limits=options.limits,
            random=options.random,
        )
    elif is_block_trace(options.trace):
        return block_trace(options.trace, rate=rate, num_requests=num, seed=seed)
    else:
        workload = Workload(
            name="timed-trace",
            num_requests=num,
            seed=seed,
            path=options.trace,
            speedup=rate,
            limits=options.limits,
        )
    return played(make_sessions(workload))


def simulate_all(options: SimulateOptions) -> Report:
    """Every layout under every policy at every rate. Raises `UsageError` for what can't be."""
    begun = time.perf_counter()
    profile = choose_profile(options)
    for rate in options.rates:
        if not 0 < rate < math.inf:
            raise UsageError(f"a rate must be positive, not {rate}")
    runs = [
        Run(
            layout=layout,
            policy=policy,
            rate=rate,
            figures=simulate_one(options, profile, layout, policy, rate),
        )
        for rate in options.rates
        for layout in options.layouts
        for policy in options.policies
    ]
    return Report(
        workload=options.workload if options.trace is None else options.trace.name,
        profile=profile,
        seed=options.seed,
        block_size=options.block_size,
        context_caching=options.context_caching,
        runs=runs,
        seconds=time.perf_counter() - begun,
    )


def simulate_one(
    options: SimulateOptions, profile: Profile, layout: str, policy: RoutingPolicy, rate: float
) -> Figures:
    """One layout under one policy at one rate."""
    return play(options, profile, layout, policy, dialogues(options, rate))


def play(
    options: SimulateOptions,
    profile: Profile,
    layout: str,
    policy: RoutingPolicy,
    asked: Iterator[Dialogue],
    *,
    elastic: bool = True,
    max_concurrency: int | None = None,
) -> Figures:
    """The figures of these dialogues. Raises `UsageError` if none fits the instances."""
    slo_ttft, slo_tpot = (
        None if limit is None else limit / 1000 for limit in (options.slo_ttft, options.slo_tpot)
    )
    setting = Setting(
        profile=profile,
        roles=parse_layout(layout),
        scheduler=SchedulerConfig(
            block_size=options.block_size,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_num_seqs=profile.max_num_seqs,
            routing_policy=policy,
            context_caching=options.context_caching,
            fetch_policy=options.fetch_policy,
            slo_ttft=slo_ttft,
            slo_tpot=slo_tpot,
            slo_admission=options.slo_admission,
            elastic_roles=elastic and options.elastic_roles and policy == "cost",
            max_sp=options.max_sp,
            sp_min_tokens=options.sp_min_tokens,
        ),
        seed=options.seed,
        num_devices=options.num_devices,
        max_concurrency=max_concurrency,
        max_tokens=options.max_tokens,
    )
    outcomes = simulate(setting, asked)
    if not outcomes.requests:
        raise UsageError("no request of the workload fits an instance's KV cache")
    return outcomes.figures(slo_ttft, slo_tpot)
