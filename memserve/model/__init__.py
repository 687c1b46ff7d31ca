"""The model: sources and conversion, loading, attention, sampling.

This package imports nothing by itself, so that the launcher can use its torch-free modules.
"""
