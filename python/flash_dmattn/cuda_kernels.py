"""The CUDA kernels: where NVRTC is, which compiles them when they are first used, and compiling them ahead of time."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

ARCHS = ("sm_80", "sm_86", "sm_90a", "sm_120")
DTYPES = ("float16", "bfloat16")
HEAD_DIMS = tuple(range(8, 257, 8))

# Bytes of local memory per thread that a kernel may take, by template name; none where it is not listed. Spilled
# registers go there, and arrays that are indexed at run time. NVRTC 13.0 spills some registers of the generic forward
# pass at head dims 112 to 128, which 13.2 does not.
LOCAL_BYTES = {"Forward": 72, "SurvivorLists": 8}


@dataclass(frozen=True)
class Kernel:
    arch: str
    header: str
    name: str


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes per thread."""

    registers: int
    local_bytes: int


def set_up() -> None:
    """Tells the engine where the wheels that PyTorch depends on have put NVRTC, and where warnings go."""
    spec = find_spec("nvidia")
    folders = [
        str(Path(root, folder))
        for root in (spec.submodule_search_locations or () if spec else ())
        for folder in ("cu13/lib", "cuda_nvrtc/lib")
    ]
    torch.ops.flash_dmattn.cuda_set_nvrtc_path([folder for folder in folders if Path(folder).is_dir()])
    torch.ops.flash_dmattn.cuda_set_warning_handler(ctypes.cast(_warn, ctypes.c_void_p).value)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _warn(text: bytes) -> None:
    warnings.warn(text.decode(), RuntimeWarning, stacklevel=2)


def compiler() -> str:
    """Name, version and path of NVRTC.

    Raises:
        RuntimeError: There is none.
    """
    return torch.ops.flash_dmattn.cuda_compiler()


def cached() -> tuple[str, list[Path]]:
    """The folder of compiled kernels ("" if there is no place for one) and its files."""
    folder = torch.ops.flash_dmattn.cuda_cache_directory()
    return folder, sorted(Path(folder).glob("*.kernel")) if folder else []


def kernels(
    archs: Sequence[str] = ARCHS,
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[int] = HEAD_DIMS,
    covering: bool = False,
) -> list[Kernel]:
    """All kernels that the engine can choose.

    With `covering` only so many that every value of each option, and every pair of values of two options, is there.
    """
    texts = torch.ops.flash_dmattn.cuda_kernels(archs, dtypes, head_dims, covering)
    return [Kernel(*texts[i : i + 3]) for i in range(0, len(texts), 3)]


def compile(kernel: Kernel) -> Resources:
    """Compiles a kernel unless it has been, and keeps it. No GPU is needed.

    Raises:
        RuntimeError: What the compiler says, or that it is missing.
    """
    return Resources(*torch.ops.flash_dmattn.cuda_compile(kernel.arch, kernel.header, kernel.name))


def compile_all(kernels: Iterable[Kernel], jobs: int) -> Iterator[tuple[Kernel, Resources]]:
    """Compiles in `jobs` threads; gives each kernel when it is done."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(compile, kernel): kernel for kernel in kernels}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def allowed_local_bytes(kernel: Kernel) -> int:
    return LOCAL_BYTES.get(kernel.name.partition("<")[0], 0)
