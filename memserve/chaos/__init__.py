"""`scripts/chaos`: a real server under load while its workers are killed and stopped.

Every answer is compared with an undisturbed one, every page and every process is counted. A client
of `memserve serve` like any other: nothing in the server knows of it.
"""
