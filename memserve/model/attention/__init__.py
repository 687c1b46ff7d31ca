"""Attention over block tables: the kernels, and their seam with transformers' models."""
