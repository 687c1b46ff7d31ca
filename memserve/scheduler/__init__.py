"""Where a request runs: pure decisions over numbers, no I/O and no torch."""
