"""The comparisons that docs/BENCHMARKS.md shows, as data: which servers, which loads, what to judge by.

All run on two cores, most with the demo model, whose lengths are cut so that a load of some ten
seconds has enough requests: the shapes stay, and shared prefixes keep their share of a prompt.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from memserve.workloads import Limits, Workload
from memserve.workloads.synthetic import PrefixLengths

Judged = Literal["mean JCT", "P99 TTFT"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One server: started with these flags of `memserve serve`, or, with a URL, one that runs."""

    name: str
    flags: tuple[str, ...] = ()
    """They stand behind `COMMON` and so before it in force; FOLDER is one of this server's own."""
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load that every variant gets; of its workload the seed changes with each repeat."""

    name: str
    workload: Workload
    max_concurrency: int | None = None
    """Requests under way at a time; with 1 a TTFT has no part of waiting for others."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared."""

    name: str
    variants: tuple[Variant, ...]
    cases: tuple[Case, ...]
    repeats: int
    baseline: str | None
    """Name of the variant that ratios are to; None: in each case the best of `fixed`."""
    fixed: tuple[str, ...] = ()
    """Variants that may be the baseline."""
    judged_by: Judged = "mean JCT"
    """What ratios are of."""
    small_model: bool = False
    """Whether the servers have `memserve.bench.small_model`, unless a model is named."""


COMMON = ("--kv-cache-memory", "512M", "--max-model-len", "4096", "--log-level", "warning")
"""Flags of every server that is started."""

FOLDER = "{folder}"
"""Among a variant's flags: an empty folder that goes with its server."""

CHATS = Limits(scale=0.5, max_output_len=48)
DOCUMENTS = Limits(scale=0.5)
AGENTS = Limits(scale=0.5, max_output_len=48)


def ablation() -> Plan:
    """The paper's four designs of context caching, on one prefill and one decode worker."""
    return Plan(
        name="ablation",
        variants=tuple(
            Variant(
                name=f"caching {design}",
                flags=(
                    *("--prefill", "1", "--decode", "1", "--no-elastic-roles"),
                    *("--context-caching", design, "--fetch-policy", "always"),
                ),
            )
            for design in ("off", "1", "2", "3")
        ),
        cases=(
            _case("sharegpt", CHATS, rate=0.8, num_requests=16),
            _case("loogle", DOCUMENTS, rate=1.5, num_requests=16),
            _case("react", AGENTS, rate=0.5, num_requests=16),
        ),
        repeats=3,
        baseline="caching off",
    )


def layouts() -> Plan:
    """Fixed layouts beside placement by measured cost, at three rates of two workloads."""
    fixed = (
        Variant(name="2 mixed", flags=_fixed("--mixed", "2")),
        Variant(name="1P1D", flags=_fixed("--prefill", "1", "--decode", "1")),
    )
    cost = Variant(name="cost", flags=("--mixed", "2", "--routing-policy", "cost"))
    return Plan(
        name="layouts",
        variants=(*fixed, cost),
        cases=(
            *(
                _case(f"sharegpt {rate}/s", CHATS, rate=rate, num_requests=number)
                for rate, number in ((0.5, 8), (1.0, 14), (2.0, 20))
            ),
            *(
                _case(f"loogle {rate}/s", DOCUMENTS, rate=rate, num_requests=number)
                for rate, number in ((1.0, 8), (2.0, 14), (4.0, 24))
            ),
        ),
        repeats=5,
        baseline=None,
        fixed=tuple(variant.name for variant in fixed),
    )


def routing() -> Plan:
    """The paper's Fig 15 in shape: four policies before three prefill workers and one for decode."""
    policies = ("round-robin", "session", "prompt-tree", "cost")
    return Plan(
        name="routing",
        variants=tuple(
            Variant(
                name=policy,
                flags=(
                    *("--prefill", "3", "--decode", "1", "--no-elastic-roles"),
                    *("--kv-cache-memory", "128M", "--routing-policy", policy),
                ),
            )
            for policy in policies
        ),
        cases=tuple(
            Case(
                name=f"shared by {num_shared}, {rate:g}/s",
                workload=Workload(
                    name="shared-documents",
                    num_requests=150,
                    num_shared=num_shared,
                    rate=rate,
                ),
            )
            for num_shared, rate in ((2, 3.0), (2, 6.0), (3, 3.0), (3, 6.0))
        ),
        repeats=2,
        baseline="round-robin",
        judged_by="P99 TTFT",
        small_model=True,
    )


def tiers() -> Plan:
    """Documents of four times the KV cache, asked about in turns: what each further tier keeps."""
    # 96 MiB are 4,368 tokens of the demo model; the documents with their answers, 17,408.
    num_documents, kv_cache, dram = 16, "96M", "384M"
    lengths = PrefixLengths(
        prefix_len=1040, suffix_len=32, num_prefixes=num_documents, output_len=16
    )
    workload = Workload(name="prefix-repetition", num_requests=3 * num_documents, prefixes=lengths)
    flags = {
        "HBM": (),
        "+ DRAM": ("--dram-cache-memory", dram),
        "+ half of it, int8": ("--dram-cache-memory", "192M", "--dram-cache-dtype", "int8"),
        "+ files": ("--cache-dir", FOLDER),
    }
    return Plan(
        name="tiers",
        variants=tuple(
            Variant(name=name, flags=("--mixed", "1", "--kv-cache-memory", kv_cache, *more))
            for name, more in flags.items()
        ),
        cases=(Case(name="4 x HBM", workload=workload, max_concurrency=1),),
        repeats=2,
        baseline="HBM",
    )


def _fixed(*roles: str) -> tuple[str, ...]:
    return (*roles, "--no-elastic-roles", "--routing-policy", "prompt-tree")


def _case(name: str, limits: Limits, *, rate: float, num_requests: int) -> Case:
    workload = Workload(
        name=name.partition(" ")[0], num_requests=num_requests, rate=rate, limits=limits
    )
    return Case(name=name, workload=workload)


PLANS = {"ablation": ablation, "layouts": layouts, "routing": routing, "tiers": tiers}


def quick(plan: Plan) -> Plan:
    """The plan as a smoke test: the same servers, a handful of short requests, two repeats."""
    limits = Limits(scale=0.05, max_output_len=8)
    cases = tuple(
        dataclasses.replace(
            case,
            workload=dataclasses.replace(case.workload, num_requests=4, rate=8.0, limits=limits),
        )
        for case in plan.cases
    )
    return dataclasses.replace(plan, cases=cases, repeats=2)
