"""Counts what objects of the package hold, so that a test sees what grows or is left behind."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

CONTAINERS = (list, tuple, set, frozenset, deque)


def census(*roots: object) -> Counter[str]:
    """Entries of every container that is reachable from `roots`, by class and attribute.

    Goes through objects whose class is memserve's, and through containers; arrays are not looked at.
    """
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", root) for root in roots]
    while pending:
        name, value = pending.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | None):
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            counts[name] += len(value)
            pending += [(f"{name}[]", inner) for inner in (*value.keys(), *value.values())]
        elif isinstance(value, CONTAINERS):
            counts[name] += len(value)
            pending += [(f"{name}[]", inner) for inner in value]
        elif isinstance(value, asyncio.Queue):
            counts[name] += value.qsize()
        elif type(value).__module__.startswith("memserve."):
            pending += attributes(value)
    return counts


def attributes(owner: object) -> Iterator[tuple[str, Any]]:
    """Name and value of all that an object holds."""
    names: set[str] = set(getattr(owner, "__dict__", ()))
    for kind in type(owner).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names.update((slots,) if isinstance(slots, str) else slots)
    if isinstance(owner, msgspec.Struct):
        names.update(owner.__struct_fields__)
    for name in names:
        if not name.startswith("__") and hasattr(owner, name):
            yield f"{type(owner).__name__}.{name}", getattr(owner, name)


def grown(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    """What has more entries than before: how many there were, how many there are."""
    return {name: (before[name], n) for name, n in after.items() if n > before[name]}
