"""KV blocks in files: the tier that survives its server.

    DIR/kv/<space>/<first two digits of the key>/<key>.kv          one file per block

A *space* is what makes KV exchangeable at all: model, layout, dtype, byte order, format. A block's key
is the hash of its parent's key and its own tokens; the parent of a first block is the hash of the
space and the cache salt. So a file's name says all that its content depends on, prompts of different
salts share nothing, and servers of any kind may share DIR.

Contract: a file appears whole or not at all (written aside, then renamed), and nothing in it is
believed: `read` compares the whole header with what it must be and the payload with its CRC-32; a
file that fails is removed, with one warning. The least recently used files go when all together
outgrow `max_bytes`; a file counts as used just after those that continue it, so that a prefix loses
its end before its head. What is written is not synced: what a power failure tears, the checks find.

KV is as private as the prompts that it was computed from: folders are made for their owner only, and
so is every file. Any number of threads and processes may use one DIR. No torch here, no thread.
"""

import contextlib
import fcntl
import logging
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import final

import msgspec

from memserve.errors import UsageError
from memserve.pool.refs import ArenaLayout

logger = logging.getLogger(__name__)

MAGIC = b"MSRVFILE"
VERSION = 1
KEY_BYTES = 32
SUFFIX = ".kv"
UNFINISHED = ".tmp"
STALE_S = 3600  # an unfinished file that is older has lost its writer
DEPTH_NS = 1000  # a block counts as used so much before the one that it continues
LOW_WATER = 15 / 16  # a sweep leaves this share of the bound

# magic, version, bytes of the payload, space, parent's key, own key; the tokens follow, then the CRC
_HEADER = struct.Struct(f"<8sIQ{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s")
_CHECKSUM = struct.Struct("<I")


@final
@dataclass(slots=True, eq=False)
class Content:
    """What a block's bytes depend on: its tokens and, through its parent, all tokens before them."""

    parent: "Content | None"
    """None: this is the root, which stands for the space and the salt, and for no block."""
    tokens: bytes
    """int32 tokens of the block, native byte order."""
    key: bytes
    depth: int
    """Number of blocks up to this one."""

    def then(self, tokens: bytes) -> "Content":
        """The block of these tokens that continues this one."""
        key = blake2b(self.key + tokens, digest_size=KEY_BYTES).digest()
        return Content(self, tokens, key, self.depth + 1)

    def up(self) -> Iterator["Content"]:
        """This block and those before it, back to the first."""
        content = self
        while content.parent is not None:
            yield content
            content = content.parent


@final
class BlockFiles:
    """The files of one space in the folder DIR."""

    def __init__(self, folder: Path, *, model: str, layout: ArenaLayout, max_bytes: int) -> None:
        """`model` must differ for models that differ. Raises UsageError for a DIR of no use."""
        shape = msgspec.structs.replace(layout, num_blocks=1)
        self._space = blake2b(
            msgspec.json.encode((VERSION, model, sys.byteorder, shape)), digest_size=KEY_BYTES
        ).digest()
        self._payload_bytes = layout.block_bytes
        self.max_bytes = max_bytes
        self._all = prepare_folder(folder)
        self.folder = self._all / self._space.hex()[:16]
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.file_bytes = _HEADER.size + 4 * layout.block_size + _CHECKSUM.size + layout.block_bytes
        if max_bytes < self.file_bytes:
            raise UsageError("--cache-dir-size has no room for a single block: raise it")
        self.num_bad = 0
        """Files that `read` has found torn, damaged or foreign."""
        self._num_made = 0

    def root(self, salt: str) -> Content:
        """Where the prompts of a cache salt begin."""
        key = blake2b(self._space + salt.encode(), digest_size=KEY_BYTES).digest()
        return Content(None, b"", key, 0)

    def has(self, content: Content) -> bool:
        """Whether there is a file of this block, good or not."""
        return os.path.exists(self._path(content))

    def touch(self, content: Content, now_ns: int) -> bool:
        """Count a block as used now; False if it has no file.

        Give the blocks of one prompt the same `now_ns`: each then comes before those it continues.
        """
        used = now_ns - content.depth * DEPTH_NS
        try:
            os.utime(self._path(content), ns=(used, used))
        except FileNotFoundError:
            return False
        return True

    def write(self, content: Content, payload: bytes | memoryview, now_ns: int) -> None:
        """Keep a block's bytes, used now. Raises OSError, and leaves no half a file then."""
        path = self._path(content)
        # Threads of one process have names of their own by the counter, processes by their number.
        self._num_made += 1
        aside = f"{path}.{os.getpid()}.{id(self)}.{self._num_made}{UNFINISHED}"
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            self._write(aside, content, payload)
            os.rename(aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
        self.touch(content, now_ns)

    def read(self, content: Content, into: memoryview) -> bool:
        """Fill `into` with a block's bytes; False if there is no good file of it.

        Then `into` holds bytes of no meaning.
        """
        path = self._path(content)
        try:
            with open(path, "rb", buffering=0) as file:
                problem = self._read(file.fileno(), content, into)
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("can't read %s: %s", path, error)
            return False
        if problem is not None:
            self.num_bad += 1
            logger.warning("%s %s: removed", path, problem)
            with contextlib.suppress(OSError):
                os.unlink(path)
        return problem is None

    def sweep(self) -> int:
        """Remove what was used least recently until the files of all spaces keep the bound.

        One process at a time does so; the others leave it to that one. Returns the bytes left, or 0
        if another one sweeps.
        """
        with self._alone() as alone:
            if not alone:
                return 0
            found = sorted(self._files())
            total = sum(size for _, size, _ in found)
            if total <= self.max_bytes:
                return total
            for _, size, path in found:
                if total <= self.max_bytes * LOW_WATER:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
            return total

    def clear(self) -> None:
        """Remove all files of this space."""
        for entry in _entries(self.folder):
            for file in _entries(Path(entry.path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.path)

    def _path(self, content: Content) -> str:
        name = content.key.hex()
        return f"{self._prefix}{name[:2]}/{name}{SUFFIX}"

    @cached_property
    def _prefix(self) -> str:
        return f"{self.folder}/"

    def _header(self, content: Content) -> bytes:
        """What must stand before the checksum."""
        assert content.parent is not None
        fixed = (MAGIC, VERSION, self._payload_bytes, self._space, content.parent.key, content.key)
        return _HEADER.pack(*fixed) + content.tokens

    def _write(self, path: str, content: Content, payload: bytes | memoryview) -> None:
        header = self._header(content) + _CHECKSUM.pack(zlib.crc32(payload))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(header)
            file.write(payload)

    def _read(self, file: int, content: Content, into: memoryview) -> str | None:
        """What is wrong with an open file; None: its payload is in `into`."""
        if os.fstat(file).st_size != self.file_bytes:
            return "has not the length of a block"
        expected = self._header(content)
        header = os.pread(file, len(expected) + _CHECKSUM.size, 0)
        if not header.startswith(expected):
            return "is not of this block"
        if os.preadv(file, [into], len(header)) != self._payload_bytes:
            return "has not the length of a block"
        if _CHECKSUM.pack(zlib.crc32(into)) != header[len(expected) :]:
            return "is damaged"
        return None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process sweeps; none will while this is open."""
        descriptor = os.open(self._all / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Time of use, size and path of every file; unfinished ones of the dead go at once."""
        now = time.time()
        for space in _entries(self._all):
            for folder in _entries(Path(space.path)):
                for file in _entries(Path(folder.path)):
                    try:
                        stat = file.stat(follow_symlinks=False)
                        if file.name.endswith(UNFINISHED) and now - stat.st_mtime > STALE_S:
                            os.unlink(file.path)
                        elif file.name.endswith(SUFFIX):
                            yield stat.st_mtime_ns, stat.st_size, file.path
                    except FileNotFoundError:  # another process was faster
                        continue


def prepare_folder(folder: Path) -> Path:
    """The folder for all files in DIR, made if need be, for its owner only.

    Raises UsageError in one sentence if no file can be written there.
    """
    inner = folder / "kv"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        inner.mkdir(mode=0o700, exist_ok=True)
        inner.chmod(0o700)
        probe = inner / f"probe.{os.getpid()}.{time.monotonic_ns()}{UNFINISHED}"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"can't keep history in --cache-dir {folder}: {reason}") from None
    return inner


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """What lies in a folder; nothing if it is none."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return
