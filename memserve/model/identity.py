"""Which model this is, by the bytes of its files: what KV that outlives a server is kept under.

Names, sizes and times can agree for models that differ (images and archives set all times alike), so
the files are read whole, once: the digest is kept in the cache for as long as no file has changed. A
change of a file always changes its ctime, which nobody can set.
"""

import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

from memserve.errors import UsageError

logger = logging.getLogger(__name__)


def weights_digest(folder: Path, cache: Path) -> str:
    """Digest of all files that lie directly in a checkpoint's folder: names and contents.

    Raises `UsageError` if they can't be read or the cache can't be written.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        stamps = "\n".join([str(folder.resolve()), *map(_stamp, files)])
        record = cache / "digests" / hashlib.sha256(stamps.encode()).hexdigest()
        if record.is_file():
            return record.read_text(encoding="ascii")
        start = time.monotonic()
        found = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").digest()
            found.update(hashlib.sha256(file.name.encode()).digest() + content)
        logger.info("read the model's files once in %.1f s", time.monotonic() - start)
        _keep(record, found.hexdigest())
    except OSError as error:
        where = error.filename or folder
        raise UsageError(f"can't tell which model this is: {where}: {error.strerror}") from error
    return found.hexdigest()


def _stamp(file: Path) -> str:
    stat = file.stat()
    times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
    return f"{file.name} {stat.st_size} {times} {stat.st_dev} {stat.st_ino}"


def _keep(record: Path, digest: str) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=record.parent)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(digest)
    Path(aside).rename(record)
