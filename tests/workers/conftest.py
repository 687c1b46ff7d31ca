"""Fixtures of the workers' tests."""

from collections.abc import Iterator

import pytest

from tests.workers.late import Late


@pytest.fixture(params=["one by one", "ahead"])
def stepping(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything twice: each step scheduled after the one before it, and steps launched ahead."""
    Late.by_default = request.param == "ahead"
    yield
    Late.by_default = False
