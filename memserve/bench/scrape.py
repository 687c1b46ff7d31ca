"""What a memserve server says of itself in /metrics, before and after a load.

Counters are summed over instances and labels; of histograms of seconds, the mean of what came between
the two looks. A server that exports nothing under memserve's prefix has no figures here.
"""

import asyncio
from dataclasses import dataclass

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "memserve:"
SETTLE_S = 1.2
"""Longer than the period of an instance's heartbeat, which carries its counters."""
MOST_LOOKS = 8


@dataclass(frozen=True)
class Look:
    """Everything that rises, by name without prefix and suffix."""

    counters: dict[str, float]
    sums: dict[str, float]
    """Seconds."""
    counts: dict[str, float]


class ServerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What happened in the server between two looks."""

    counters: dict[str, float]
    """Such as `engine_prefill_tokens`, `pulled_bytes`."""
    mean_seconds: dict[str, float]
    """Such as `request_decode_time`, `time_to_first_token`; only those that happened."""


def parse(text: str) -> Look | None:
    """A look out of the text of /metrics; None if it isn't memserve's."""
    look = Look({}, {}, {})
    found = False
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PREFIX):
            continue
        found = True
        name = family.name.removeprefix(PREFIX)
        for sample in family.samples:
            if sample.name.endswith("_total"):
                look.counters[name] = look.counters.get(name, 0) + sample.value
            elif family.type == "histogram" and name.endswith("_seconds"):
                phase = name.removesuffix("_seconds")
                if sample.name.endswith("_sum"):
                    look.sums[phase] = look.sums.get(phase, 0) + sample.value
                elif sample.name.endswith("_count"):
                    look.counts[phase] = look.counts.get(phase, 0) + sample.value
    return look if found else None


def between(before: Look, after: Look) -> ServerFigures:
    """What happened between the two."""
    counters = {
        name: value - before.counters.get(name, 0) for name, value in after.counters.items()
    }
    means = {
        name: (total - before.sums.get(name, 0)) / count
        for name, total in after.sums.items()
        if (count := after.counts[name] - before.counts.get(name, 0)) > 0
    }
    return ServerFigures(counters=counters, mean_seconds=means)


async def look(http: aiohttp.ClientSession) -> Look | None:
    """What the server says now; None if it says nothing that memserve would."""
    try:
        async with http.get("/metrics") as response:
            return parse(await response.text()) if response.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None


async def settled_look(http: aiohttp.ClientSession) -> Look | None:
    """A look after which the counters stood still for longer than a heartbeat, or nearly so."""
    latest = await look(http)
    for _ in range(MOST_LOOKS if latest else 0):
        await asyncio.sleep(SETTLE_S)
        later = await look(http)
        if later is None or still(latest, later):
            return later
        latest = later
    return latest


def still(one: Look | None, other: Look) -> bool:
    """Whether no work was done between the two; an idle engine may count steps."""
    return one is not None and all(
        one.counters.get(name) == value
        for name, value in other.counters.items()
        if name != "engine_steps"
    )
