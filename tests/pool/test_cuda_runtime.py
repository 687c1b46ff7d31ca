"""The calls into CUDA's runtime library, as far as they go without a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memserve.errors import DeviceError, UsageError
from memserve.pool import cuda_runtime
from memserve.pool.cuda_runtime import HANDLE_BYTES, LoadedCuda, load_runtime, open_cuda

TOOLKIT = Path("/usr/local/cuda")
LIBRARY = next(iter(sorted(TOOLKIT.glob("lib64/libcudart.so.*"))), None)

needs_library = pytest.mark.skipif(LIBRARY is None, reason="no CUDA runtime library here")


@needs_library
def test_every_call_is_in_the_library_and_its_failures_come_with_cudas_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU they succeed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    described = SimpleNamespace(uuid="GPU-0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: described)
    cuda = LoadedCuda(0, ctypes.CDLL(str(LIBRARY)))
    calls = (
        lambda: cuda.allocate(64),
        lambda: cuda.export(64),
        lambda: cuda.pin(64, 64),
        cuda.memory,
        lambda: cuda.close(64),
    )
    for call in calls:
        with pytest.raises(DeviceError, match=r"cuda\w+: .*\(CUDA error \d+\)"):
            call()


def test_without_a_gpu_the_reason_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=r"--device cuda: torch .* sees no GPU"):
        open_cuda(0)


def test_a_missing_runtime_library_is_named() -> None:
    with pytest.raises(UsageError, match=r"libcudart\.so\.99"):
        load_runtime("99.1")


HEADER_CHECK = """
#include <cuda_runtime_api.h>
#include <stdio.h>
int main(void) {
    cudaError_t (*malloc_)(void **, size_t) = cudaMalloc;
    cudaError_t (*memset_)(void *, int, size_t) = cudaMemset;
    cudaError_t (*info)(size_t *, size_t *) = cudaMemGetInfo;
    cudaError_t (*copy)(void *, const void *, size_t, enum cudaMemcpyKind, cudaStream_t) =
        cudaMemcpyAsync;
    cudaError_t (*pin)(void *, size_t, unsigned int) = cudaHostRegister;
    cudaError_t (*can)(int *, int, int) = cudaDeviceCanAccessPeer;
    cudaError_t (*get)(cudaIpcMemHandle_t *, void *) = cudaIpcGetMemHandle;
    cudaError_t (*open_)(void **, cudaIpcMemHandle_t, unsigned int) = cudaIpcOpenMemHandle;
    cudaError_t (*close_)(void *) = cudaIpcCloseMemHandle;
    printf("%d %d %d %d %d %d\\n", (int)sizeof(cudaIpcMemHandle_t), cudaErrorMemoryAllocation,
           cudaIpcMemLazyEnablePeerAccess, cudaMemcpyDefault, cudaHostRegisterPortable,
           malloc_ && memset_ && info && copy && pin && can && get && open_ && close_);
}
"""


@needs_library
def test_types_and_constants_are_those_of_the_toolkits_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not (TOOLKIT / "include" / "cuda_runtime_api.h").exists():
        pytest.skip("no compiler, or no CUDA headers here")
    source, program = tmp_path / "check.c", tmp_path / "check"
    source.write_text(HEADER_CHECK)
    subprocess.run(
        [
            *(compiler, "-Werror=incompatible-pointer-types", f"-I{TOOLKIT}/include"),
            *(str(source), "-o", str(program), str(LIBRARY), f"-Wl,-rpath,{TOOLKIT}/lib64"),
        ],
        check=True,
    )
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [
        str(number)
        for number in (
            HANDLE_BYTES,
            cuda_runtime._OUT_OF_MEMORY,
            cuda_runtime._LAZY_PEER_ACCESS,
            cuda_runtime._COPY_DEFAULT,
            cuda_runtime._REGISTER_PORTABLE,
            1,
        )
    ]
