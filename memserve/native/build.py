"""Compile this folder's C and C++ sources once per machine and load them through ctypes.

Contract: `load_library` returns the library, or None where it can't be had (no compiler, or the
compiler refuses), after a log line with the reason; the caller says what it does instead. A library
is cached under a key of everything that decides its content: sources and headers, flags, compiler
version, the CPU's features and the libraries it links. Several processes may build at once: one
compiles, the others wait. A killed build leaves only a temporary file that the next one replaces.

It does not declare argument types: who calls a library declares its functions.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from memserve.paths import cache_dir

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent
BASE_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-Wall", "-Wextra")
C_COMPILERS = ("gcc", "cc", "clang")
CXX_COMPILERS = ("g++", "c++", "clang++")
COMPILE_TIMEOUT_S = 300.0


def load_library(
    name: str,
    sources: Sequence[str],
    *,
    flags: Sequence[str] = (),
    libraries: Sequence[Path] = (),
    directory: Path | None = None,
) -> ctypes.CDLL | None:
    """Compile `sources` unless cached, and load the result.

    `sources` are file names in memserve/native (an absolute path is taken as it is), `name` is the
    stem of the cached file. `flags` follow the base flags, e.g. `-fopenmp` or
    `-std=c++17`. `libraries` are shared libraries to link by path; their folders become the run
    path, so that a library bundled with a wheel is found again. `directory` holds the cache
    (default: `native` under the cache folder; a private temporary folder if that can't be
    written). C++ is compiled if any source ends in `.cpp`. Calls into the library release the GIL.
    """
    candidates = CXX_COMPILERS if any(s.endswith(".cpp") for s in sources) else C_COMPILERS
    compiler = next((path for c in candidates if (path := shutil.which(c))), None)
    if compiler is None:
        logger.warning("no compiler for %s: none of %s is installed", name, ", ".join(candidates))
        return None
    paths = [SOURCE_DIR / source for source in sources]
    key = _key(compiler, paths, flags, libraries)
    folder = _writable_folder(directory or cache_dir() / "native")
    target = folder / f"{name}-{key}.so"
    with _locked(folder / f"{name}-{key}.lock"):
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError as error:
                logger.warning("%s can't be loaded and is built again: %s", target, error)
        command = [compiler, *BASE_FLAGS, *flags, *map(str, paths)]
        for library in libraries:
            command += [str(library), f"-Wl,-rpath,{library.parent}"]
        if not _compile(name, command, target):
            return None
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        logger.error("the freshly built %s can't be loaded: %s", target, error)  # noqa: TRY400
        return None


def _compile(name: str, command: list[str], target: Path) -> bool:
    temporary = target.with_suffix(".tmp")
    logger.info("compiling %s (once on this machine)", name)
    try:
        done = subprocess.run(
            [*command, "-o", str(temporary)],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.error("compiling %s failed: %s", name, error)  # noqa: TRY400
        return False
    if done.returncode != 0:
        logger.error("compiling %s failed (%s):\n%s", name, command[0], done.stderr.strip())
        return False
    temporary.replace(target)
    return True


def _key(
    compiler: str, paths: Sequence[Path], flags: Sequence[str], libraries: Sequence[Path]
) -> str:
    digest = hashlib.sha256()
    headers = sorted(SOURCE_DIR.glob("*.h"))
    for path in (*paths, *headers):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    described = [compiler, _compiler_version(compiler), _cpu_features(), *BASE_FLAGS, *flags]
    for library in libraries:
        status = library.stat()
        described.append(f"{library}:{status.st_size}:{status.st_mtime_ns}")
    digest.update("\0".join(described).encode())
    return digest.hexdigest()[:20]


@lru_cache(maxsize=8)
def _compiler_version(compiler: str) -> str:
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout


@lru_cache(maxsize=1)
def _cpu_features() -> str:
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described = {line for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), *sorted(described)])


def _writable_folder(wanted: Path) -> Path:
    """`wanted`, made if need be, or a temporary folder of this user if it can't be written."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if os.access(wanted, os.W_OK | os.X_OK):
            return wanted
        reason = "it is read-only"
    except OSError as error:
        reason = str(error)
    fallback = Path(tempfile.gettempdir()) / f"memserve-{os.getuid()}"
    try:
        fallback.mkdir(mode=0o700, exist_ok=True)
        status = fallback.lstat()
        # We load code from here: a folder that somebody else prepared won't do.
        ours = status.st_uid == os.getuid() and not status.st_mode & 0o077
        private = ours and not fallback.is_symlink()
    except OSError:
        private = False
    if not private:
        fallback = Path(tempfile.mkdtemp(prefix="memserve-"))
    logger.warning("can't write %s (%s): compiled code goes to %s", wanted, reason, fallback)
    return fallback


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
