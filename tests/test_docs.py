"""The README says what is there."""

import dataclasses
from pathlib import Path

import pytest

from memserve.config import ServeConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FLAGS = [field.name.replace("_", "-") for field in dataclasses.fields(ServeConfig)]
ROOMS = [
    path.name + "/" * path.is_dir()
    for path in sorted((ROOT / "memserve").iterdir())
    if path.suffix == ".py" or (path / "__init__.py").is_file()
]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_stands_in_the_readme(flag: str) -> None:
    assert f"| `--{flag}` |" in README


@pytest.mark.parametrize("name", [name for name in ROOMS if not name.startswith("__")])
def test_every_room_stands_in_the_readme(name: str) -> None:
    assert f"`memserve/{name}`" in README or f"`{name}`" in README
