"""The Triton kernels in Triton's interpreter: run by `tests/model/test_triton.py`."""
