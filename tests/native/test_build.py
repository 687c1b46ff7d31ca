"""Native sources are compiled once, by one process, and a missing compiler is said, not hidden."""

import ctypes
import logging
import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from memserve.native.build import load_library

SOURCE = "int answer(void) { return ANSWER; }\n"


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return str(path)


def build(source: str, directory: Path, answer: int = 42) -> ctypes.CDLL | None:
    return load_library("answer", [source], flags=[f"-DANSWER={answer}"], directory=directory)


def libraries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.so"))


def test_a_library_is_compiled_once_and_then_found(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        library = build(source, tmp_path / "cache")
        assert library is not None
        assert library.answer() == 42
    assert sum("compiling" in message for message in caplog.messages) == 1


def test_other_flags_or_another_source_are_another_library(source: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = build(source, cache, 1), build(source, cache, 2)
    Path(source).write_text(SOURCE.replace("ANSWER;", "ANSWER + 10;"))
    third = build(source, cache, 1)
    assert [lib.answer() for lib in (first, second, third) if lib] == [1, 2, 11]
    assert len(libraries(cache)) == 3


def test_a_damaged_cached_library_is_built_again(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    # Loaded in another process only: one that is loaded here must not change under our feet.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(build_and_answer, (source, cache))
    (path,) = libraries(cache)
    path.write_bytes(b"not a library")
    library = build(source, cache)
    assert library is not None
    assert library.answer() == 42
    assert "built again" in caplog.text


def build_and_answer(source: str, directory: Path) -> int:
    library = build(source, directory)
    assert library is not None
    return int(library.answer())


def test_processes_that_build_at_once_share_one_library(source: str, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        answers = pool.starmap(build_and_answer, [(source, tmp_path / "cache")] * 3)
    assert answers == [42, 42, 42]
    assert len(libraries(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_without_a_compiler_there_is_no_library_and_the_log_says_so(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert build(source, tmp_path / "cache") is None
    assert "no compiler for answer" in caplog.text


def test_a_source_that_does_not_compile_is_no_library_and_the_log_has_the_reason(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(source).write_text("int answer(void) { return undeclared_name; }")
    assert build(source, tmp_path / "cache") is None
    assert "undeclared_name" in caplog.text


def test_a_folder_that_cannot_be_written_is_replaced_by_a_temporary_one(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = build(source, tmp_path / "file" / "cache")
    assert library is not None
    assert library.answer() == 42
    assert "can't write" in caplog.text
    assert len(list(tmp_path.glob("memserve-*/*.so"))) == 1


def test_a_temporary_folder_that_others_can_write_is_not_trusted(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    shared = tmp_path / f"memserve-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build(source, tmp_path / "file" / "cache") is not None
    assert not libraries(shared)
