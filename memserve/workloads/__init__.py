"""Workloads: the sessions that `memserve bench` sends and `memserve simulate` plays, drawn from a seed.

Pure Python and numpy; nothing here talks to a server or loads a model. `make_sessions` is the door.
"""

from memserve.workloads.catalog import NAMES, Workload, make_sessions
from memserve.workloads.drawing import synthetic_tokens
from memserve.workloads.loogle import Document
from memserve.workloads.sessions import Limits, Session, Turn, drawn_answer

__all__ = [
    "NAMES",
    "Document",
    "Limits",
    "Session",
    "Turn",
    "Workload",
    "drawn_answer",
    "make_sessions",
    "synthetic_tokens",
]
