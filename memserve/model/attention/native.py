"""The compiled CPU kernels: their loading and their C signatures.

`load_kernels` returns None where they can't be compiled; the callers have a torch path. OpenMP code
is linked with the libgomp that torch bundles, so that there is one OpenMP runtime in the process
and `torch.set_num_threads` governs these kernels too.
"""

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path

import torch

from memserve.model.step import StepInput
from memserve.native.build import load_library

log = logging.getLogger(__name__)

SOURCES = ("attention.cpp", "layer_ops.cpp", "matmul.cpp", "prefill.cpp")


class PrefillOperands(IntEnum):
    """What the kernel for long chunks can multiply on this machine."""

    NONE = 0
    FLOAT32 = 1
    """Whatever the arena holds."""
    BFLOAT16 = 2
    """A bfloat16 arena on matrix tiles (AMX), float32 as above."""


class NativeStep(ctypes.Structure):
    """Mirror of `Step` in memserve/native/kernels.h; strides count elements."""

    _fields_ = (
        ("arena", c_void_p),
        ("layer_stride", c_int64),
        ("value_stride", c_int64),
        ("positions", c_void_p),
        ("query_start", c_void_p),
        ("kv_len", c_void_p),
        ("offsets", c_void_p),
        ("table_stride", c_int64),
        ("num_sequences", c_int32),
        ("num_tokens", c_int32),
        ("block_size", c_int32),
        ("num_query_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("is_bfloat16", c_int32),
    )


class Kernels:
    """The library's functions with their argument types bound once."""

    def __init__(self, library: ctypes.CDLL) -> None:
        step = POINTER(NativeStep)
        self.attend = library.memserve_attend
        self.attend.argtypes = [
            *(step, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
            *(c_float, c_int32, c_void_p, c_int32),
        ]
        self.prefill = library.memserve_prefill
        self.prefill.argtypes = [
            *(step, c_int64, c_void_p, c_int64, c_void_p, c_int64),
            *(c_float, c_int32, c_void_p, c_int32, c_void_p, c_int64),
        ]
        self.prefill.restype = None
        self.prefill_claim = library.memserve_prefill_claim
        self.prefill_claim.argtypes = [step, c_void_p]
        self.prefill_claim.restype = None
        self.prefill_scratch = library.memserve_prefill_scratch
        self.prefill_scratch.argtypes = [step, c_void_p, c_int32]
        self.prefill_scratch.restype = c_int64
        self.prefill_operands = PrefillOperands(library.memserve_prefill_operands())
        self.write_kv = library.memserve_write_kv
        self.write_kv.argtypes = [step, c_int64, c_void_p, c_int64, c_void_p, c_int64]
        self.gather_kv = library.memserve_gather_kv
        self.gather_kv.argtypes = [step, c_int64, c_int32, c_int64, c_int64, c_void_p, c_void_p]
        self.add_norm = library.memserve_add_norm
        self.add_norm.argtypes = [*[c_void_p] * 4, c_int64, c_int64, c_float, c_int32]
        self.rotate_and_write = library.memserve_rotate_and_write
        self.rotate_and_write.argtypes = [step, c_int64, *[c_void_p] * 5, c_float]
        self.silu_times = library.memserve_silu_times
        self.silu_times.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int32]
        self.pack_weight = library.memserve_pack_weight
        self.pack_weight.argtypes = [c_void_p, *[c_int64] * 4, c_void_p]
        self.multiply = library.memserve_multiply
        self.multiply.argtypes = [*[c_void_p] * 4, *[c_int64] * 3, c_int32]
        self.has_matmul = bool(library.memserve_matmul_available())
        functions = (
            *(self.attend, self.write_kv, self.gather_kv, self.add_norm),
            *(self.rotate_and_write, self.silu_times),
            *(self.pack_weight, self.multiply),
        )
        for function in functions:
            function.restype = None


def load_kernels(extra_flags: Sequence[str] = ()) -> Kernels | None:
    """The compiled kernels, or None (with the reason in the log).

    `extra_flags` for the compiler, e.g. to leave out what this CPU has and others haven't.
    """
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    bundled += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    flags = ("-std=c++17", "-fopenmp", "-fno-math-errno", *extra_flags)
    library = load_library("kernels", SOURCES, flags=flags, libraries=bundled[:1])
    return None if library is None else Kernels(library)


def block_offsets(step: StepInput, arena: torch.Tensor) -> torch.Tensor:
    """Where the blocks of each sequence lie, int64 [S, max_blocks], in elements of the arena."""
    if step.offsets is not None:
        return step.offsets
    return step.block_table.long().mul_(arena.stride(0))


def native_step(
    step: StepInput, arena: torch.Tensor, offsets: torch.Tensor, num_query_heads: int
) -> NativeStep:
    """Describe a step to the kernels. It borrows the tensors' memory: keep them alive."""
    _, layer_stride, value_stride = arena.stride()[:3]
    _, _, _, block_size, num_kv_heads, head_dim = arena.shape
    return NativeStep(
        arena=arena.data_ptr(),
        layer_stride=layer_stride,
        value_stride=value_stride,
        positions=step.positions.data_ptr(),
        query_start=step.query_start.data_ptr(),
        kv_len=step.kv_len.data_ptr(),
        offsets=offsets.data_ptr(),
        table_stride=offsets.stride(0),
        num_sequences=step.kv_len.numel(),
        num_tokens=step.token_ids.numel(),
        block_size=block_size,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        is_bfloat16=arena.dtype == torch.bfloat16,
    )
