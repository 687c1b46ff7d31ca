"""Blocks in files: what comes back is what was written, or nothing."""

import fcntl
import os
import stat
import threading
import time
from pathlib import Path

import msgspec
import pytest

from memserve.errors import UsageError
from memserve.pool.disk import BlockFiles, Content
from memserve.pool.refs import ArenaLayout

LAYOUT = ArenaLayout(8, 2, 4, 2, 8, "float32")
TOKENS = b"".join(number.to_bytes(4, "little") for number in range(4))


def files_in(folder: Path, *, model: str = "one", max_bytes: int = 1 << 30) -> BlockFiles:
    return BlockFiles(folder, model=model, layout=LAYOUT, max_bytes=max_bytes)


def payload(seed: int) -> bytes:
    return bytes((seed + i) % 251 for i in range(LAYOUT.block_bytes))


def read(files: BlockFiles, content: Content) -> bytes | None:
    into = bytearray(LAYOUT.block_bytes)
    return bytes(into) if files.read(content, memoryview(into)) else None


def paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".kv", ".tmp"))


def chain(files: BlockFiles, length: int, salt: str = "") -> list[Content]:
    found = [files.root(salt)]
    for number in range(length):
        found.append(found[-1].then(bytes([number]) * 16))
    return found[1:]


def test_what_was_written_is_read_by_a_later_server(tmp_path: Path) -> None:
    first, second, *_ = chain(files_in(tmp_path), 2)
    files_in(tmp_path).write(first, payload(1), time.time_ns())
    files_in(tmp_path).write(second, payload(2), time.time_ns())
    later = files_in(tmp_path)
    first, second = chain(later, 2)
    assert later.has(first)
    assert read(later, first) == payload(1)
    assert read(later, second) == payload(2)


def test_what_is_not_there_is_a_miss_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_in(tmp_path)
    content = files.root("").then(TOKENS)
    assert not files.has(content)
    assert read(files, content) is None
    assert not files.touch(content, time.time_ns())
    assert not caplog.records


def test_the_same_tokens_after_others_or_under_another_salt_are_another_block(
    tmp_path: Path,
) -> None:
    files = files_in(tmp_path)
    found = [
        files.root("").then(TOKENS),
        files.root("a").then(TOKENS),
        files.root("").then(TOKENS).then(TOKENS),
        files.root("").then(TOKENS[::-1]).then(TOKENS),
    ]
    assert len({content.key for content in found}) == len(found)


def test_a_file_that_is_cut_anywhere_is_removed_and_never_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_in(tmp_path)
    content = files.root("").then(TOKENS)
    files.write(content, payload(1), time.time_ns())
    (path,) = paths(tmp_path)
    whole = path.read_bytes()
    assert len(whole) == files.file_bytes
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        assert read(files, content) is None
        assert not path.exists()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    path.write_bytes(whole + b"\0")
    assert read(files, content) is None
    path.write_bytes(whole)
    assert read(files, content) == payload(1)
    assert files.num_bad == len(whole) + 1


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    content = files.root("").then(TOKENS)
    files.write(content, payload(1), time.time_ns())
    (path,) = paths(tmp_path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert read(files, content) is None


def test_a_file_whose_middle_was_never_written_is_noticed(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    content = files.root("").then(TOKENS)
    files.write(content, payload(1), time.time_ns())
    (path,) = paths(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:300] + bytes(len(whole) - 300))
    assert read(files, content) is None


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("two", {}),
        ("one", {"dtype": "bfloat16", "head_dim": 16}),
        ("one", {"num_layers": 4, "num_kv_heads": 1}),
        ("one", {"block_size": 8, "num_layers": 1}),
    ],
)
def test_a_file_of_another_model_layout_or_dtype_is_not_found_nor_believed(
    tmp_path: Path, model: str, changes: dict[str, object]
) -> None:
    ours = files_in(tmp_path)
    layout = msgspec.structs.replace(LAYOUT, **changes)
    assert layout.block_bytes == LAYOUT.block_bytes
    theirs = BlockFiles(tmp_path, model=model, layout=layout, max_bytes=1 << 30)
    tokens = TOKENS * (layout.block_size // LAYOUT.block_size)
    theirs.write(theirs.root("").then(tokens), payload(1), time.time_ns())
    content = ours.root("").then(TOKENS)
    assert not ours.has(content)
    (their_path,) = paths(tmp_path)
    ours.write(content, payload(2), time.time_ns())
    (our_path,) = set(paths(tmp_path)) - {their_path}
    our_path.write_bytes(their_path.read_bytes())
    assert read(ours, content) is None


def test_the_number_of_blocks_of_an_arena_does_not_matter(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    files.write(files.root("").then(TOKENS), payload(1), time.time_ns())
    larger = msgspec.structs.replace(LAYOUT, num_blocks=99)
    other = BlockFiles(tmp_path, model="one", layout=larger, max_bytes=1 << 30)
    assert read(other, other.root("").then(TOKENS)) == payload(1)


def test_an_unreadable_file_is_skipped_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_in(tmp_path)
    content = files.root("").then(TOKENS)
    files.write(content, payload(1), time.time_ns())
    (path,) = paths(tmp_path)
    path.unlink()
    path.mkdir()  # what even root can't read as a file
    assert read(files, content) is None
    assert path.exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_folders_and_files_are_their_owners_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        files = files_in(tmp_path / "deep" / "cache")
        files.write(files.root("").then(TOKENS), payload(1), time.time_ns())
        files.sweep()
    finally:
        os.umask(old)
    made = [tmp_path / "deep" / "cache", *(tmp_path / "deep" / "cache").rglob("*")]
    assert len(made) == 6
    for path in made:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected


def test_a_folder_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o755)
    files_in(tmp_path)
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700


def test_a_folder_that_can_not_be_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--cache-dir .*/file/inner: Not a directory"):
        files_in(tmp_path / "file" / "inner")
    with pytest.raises(UsageError, match="--cache-dir-size"):
        files_in(tmp_path, max_bytes=100)


def test_many_writers_and_readers_of_one_block_never_see_half_of_it(tmp_path: Path) -> None:
    content = files_in(tmp_path).root("").then(TOKENS)
    wrong: list[bytes] = []

    def write() -> None:
        files = files_in(tmp_path)
        for _ in range(100):
            files.write(content, payload(1), time.time_ns())

    def look() -> None:
        files = files_in(tmp_path)
        for _ in range(300):
            found = read(files, content)
            if files.has(content) and found not in (None, payload(1)):
                wrong.append(b"")
        wrong.extend([b""] * files.num_bad)

    threads = [threading.Thread(target=work) for work in (write, write, look, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(paths(tmp_path)) == 1
    assert read(files_in(tmp_path), content) == payload(1)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_in(tmp_path)

    def full(_source: str, _destination: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        files.write(files.root("").then(TOKENS), payload(1), time.time_ns())
    assert paths(tmp_path) == []


def test_the_files_used_least_recently_go_first(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    bound = 8 * files.file_bytes
    files = files_in(tmp_path, max_bytes=bound)
    prompts = {salt: chain(files, 3, salt) for salt in ("a", "b", "c")}
    for number, prompt in enumerate(prompts.values(), start=1):
        for content in prompt:
            files.write(content, payload(1), number * 10**9)
    now_ns = time.time_ns()
    for content in prompts["a"]:
        assert files.touch(content, now_ns)
    left = files.sweep()
    assert left == 7 * files.file_bytes <= bound * 15 / 16
    kept = {salt: [files.has(content) for content in prompt] for salt, prompt in prompts.items()}
    # Of the coldest prompt the end goes, not the head that the rest is useless without.
    assert kept == {"a": [True] * 3, "b": [True, False, False], "c": [True] * 3}
    assert files.sweep() == left


def test_the_bound_holds_for_all_models_together(tmp_path: Path) -> None:
    one = files_in(tmp_path)
    for content in chain(one, 6):
        one.write(content, payload(1), time.time_ns())
    two = files_in(tmp_path, model="two", max_bytes=4 * one.file_bytes)
    assert two.sweep() <= 4 * one.file_bytes
    assert len(paths(tmp_path)) <= 4


def test_only_one_process_sweeps_at_a_time(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    for content in chain(files, 3):
        files.write(content, payload(1), time.time_ns())
    small = files_in(tmp_path, max_bytes=files.file_bytes)
    with (tmp_path / "kv" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert small.sweep() == 0
        assert len(paths(tmp_path)) == 3
    small.sweep()
    assert len(paths(tmp_path)) == 0


def test_what_a_killed_writer_left_goes_after_a_while(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    files.write(files.root("").then(TOKENS), payload(1), time.time_ns())
    (path,) = paths(tmp_path)
    fresh = path.with_name("fresh.kv.1.tmp")
    stale = path.with_name("stale.kv.1.tmp")
    for file in (fresh, stale):
        file.touch()
    os.utime(stale, (1, 1))
    files.sweep()
    assert (fresh.exists(), stale.exists(), path.exists()) == (True, False, True)


def test_clearing_leaves_other_models_alone(tmp_path: Path) -> None:
    one, two = files_in(tmp_path), files_in(tmp_path, model="two")
    for files in (one, two):
        files.write(files.root("").then(TOKENS), payload(1), time.time_ns())
    one.clear()
    assert not one.has(one.root("").then(TOKENS))
    assert read(two, two.root("").then(TOKENS)) == payload(1)
