"""Only a process that has the interpreter on from its start can run these tests."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
