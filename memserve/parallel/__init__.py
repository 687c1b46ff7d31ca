"""Sequence parallelism: one prompt prefilled by several instances. What both sides must agree on."""
