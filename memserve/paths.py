"""Where memserve keeps files on this machine.

Reads MEMSERVE_HOME, XDG_CACHE_HOME and HOME, and nothing else does. Creates no folder.
"""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for what can be made again: converted models and compiled kernels.

    MEMSERVE_HOME, else `memserve` under XDG_CACHE_HOME, else `~/.cache/memserve`.
    """
    if chosen := os.environ.get("MEMSERVE_HOME"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "memserve"
    return Path.home() / ".cache" / "memserve"
