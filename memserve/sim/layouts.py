"""Layouts by name: `2P1D` is two prefill instances and one decode instance, `3M` three mixed ones."""

import re

from memserve.errors import UsageError
from memserve.scheduler.interface import Role

ROLE_BY_LETTER = {"P": Role.PREFILL, "D": Role.DECODE, "M": Role.MIXED}


def parse_layout(text: str) -> tuple[Role, ...]:
    """The roles of the instances. Raises `UsageError` unless some prefill and some decode."""
    parts = re.findall(r"(\d+)([PDM])", text.upper())
    if not parts or "".join(number + letter for number, letter in parts) != text.upper():
        raise UsageError(f"{text!r} is no layout: write it as 1P1D, 2P1D1M or 3M")
    roles = tuple(ROLE_BY_LETTER[letter] for number, letter in parts for _ in range(int(number)))
    if not any(role.prefills for role in roles) or not any(role.decodes for role in roles):
        raise UsageError(f"layout {text} needs instances that prefill and instances that decode")
    return roles


def fixed_layouts(num_instances: int) -> list[str]:
    """All mixed, and every split into prefill and decode instances."""
    splits = [f"{p}P{num_instances - p}D" for p in range(1, num_instances)]
    return [f"{num_instances}M", *splits]
