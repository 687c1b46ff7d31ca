"""A model is known by its bytes."""

import os
import shutil
from pathlib import Path

import pytest

from memserve.errors import UsageError
from memserve.model.identity import weights_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_digest_is_the_same_at_every_start_and_read_from_the_cache(
    folder: Path, cache: Path
) -> None:
    first = weights_digest(folder, cache)
    assert weights_digest(folder, cache) == first
    (record,) = (cache / "digests").iterdir()
    record.write_text("kept")
    assert weights_digest(folder, cache) == "kept"


def test_a_copy_elsewhere_is_the_same_model(folder: Path, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert weights_digest(copy, cache) == weights_digest(folder, cache)


def test_other_bytes_of_the_same_name_size_and_time_are_another_model(
    folder: Path, cache: Path
) -> None:
    file = folder / "model.safetensors"
    os.utime(file, (1, 1))
    first = weights_digest(folder, cache)
    changed = bytearray(file.read_bytes())
    changed[12345] ^= 1
    file.write_bytes(changed)
    os.utime(file, (1, 1))
    assert weights_digest(folder, cache) != first


def test_a_renamed_file_is_another_model(folder: Path, cache: Path) -> None:
    first = weights_digest(folder, cache)
    (folder / "config.json").rename(folder / "other.json")
    assert weights_digest(folder, cache) != first


def test_a_folder_that_is_not_there_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        weights_digest(tmp_path / "nothing", cache)
