"""Benchmarks: what memserve's parts reach, beside what the machine and the peers allow.

Used by `scripts/bench_*`; nothing that serves imports it.
"""
