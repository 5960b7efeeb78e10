"""Compile the idle GPU, and the environment in which programs find it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path

_SOURCES = Path(__file__).parent
_TORCH_LIBRARIES = ("torch_cuda", "torch_cuda_linalg", "torch_python", "torch_cpu", "c10_cuda", "caffe2_nvrtc")
_STANDS_IN_FOR = ("cu", "cudnn", "cublas", "nccl", "__cuda")
# These keep working without a device, and PyTorch has them do nothing.
_TRUE_ONES = ("cufft", "cusparse", "cusolver", "cupti", "cuFile")
# Functions of cuBLAS and cuDNN that are a kernel at least.
_COMPUTES = re.compile("[Gg]em[mv]|LtMatmul$|cudnnBackendExecute$|cudnnBatchNorm.*Ex$")
# Called by Triton alone, through a file that it compiles when it is first used.
_OF_TRITON = ("cuCtxSetLimit", "cuTensorMapEncodeIm2col", "cuPointerGetAttributes")


class Missing(Exception):
    """Something that is needed to compile it is not here."""


def build(folder: Path) -> Path:
    """Compile the library into a folder, which may have it already.

    Raises:
        Missing: this PyTorch is not for CUDA, or there is no C compiler.
    """
    library = folder / "libcuda.so.1"  # the name under which the driver is asked for
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in _includes()]
    compiler = ["gcc", "-O2", "-w", "-fPIC"]
    for name in ("device", "libraries"):
        _run([*compiler, *includes, "-c", str(_SOURCES / f"{name}.c"), "-o", str(folder / f"{name}.o")])
    ours = set().union(*(_symbols(folder / f"{name}.o", "--defined-only") for name in ("device", "libraries")))
    asked = set(_OF_TRITON).union(*map(_asked_for, _torch_libraries()))
    rest = [
        f"int {name}(void) {{ {'idle_gpu_launch(); ' if _COMPUTES.search(name) else ''}return 0; }}"
        for name in sorted(asked - ours)
    ]
    (folder / "rest.c").write_text("\n".join(["void idle_gpu_launch(void);", *rest, ""]))
    _run([*compiler, "-c", str(folder / "rest.c"), "-o", str(folder / "rest.o")])
    objects = [str(folder / f"{name}.o") for name in ("device", "libraries", "rest")]
    made = folder / f".{os.getpid()}.so"
    _run(["gcc", "-shared", f"-Wl,-soname,{library.name}", *objects, "-o", str(made), "-lpthread", "-ldl"])
    made.replace(library)
    return library


def environment(folder: Path) -> dict[str, str]:
    """Variables for a program that shall see the idle GPU; kernels are compiled into the folder as well."""
    return {
        "LD_PRELOAD": str(build(folder)),
        "PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK": "1",
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def launches() -> int:
    """Kernels that this process has launched so far.

    Raises:
        OSError: this process sees no idle GPU.
    """
    counter = ctypes.CDLL("libcuda.so.1").idle_gpu_launches
    counter.restype = ctypes.c_ulong
    return int(counter())


def _torch_libraries() -> list[Path]:
    [torch] = _locations("torch")
    paths = [torch / "lib" / f"lib{name}.so" for name in _TORCH_LIBRARIES]
    if not paths[0].exists():
        raise Missing("this PyTorch is not built for CUDA")
    return [path for path in paths if path.exists()]


def _includes() -> list[Path]:
    """Headers of the CUDA that PyTorch uses; some that they include come with Triton alone."""
    found = [path.parent for root in _locations("nvidia") for path in root.glob("*/include/cuda_runtime_api.h")]
    if not found:
        raise Missing("the headers of CUDA's runtime, which come with PyTorch for CUDA, are not here")
    return [*found[:1], *(root / "backends" / "nvidia" / "include" for root in _locations("triton"))]


def _locations(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]


def _asked_for(library: Path) -> set[str]:
    """What a library of PyTorch wants of CUDA's."""
    names = _symbols(library, "--undefined-only", "--dynamic")
    return {name for name in names if name.startswith(_STANDS_IN_FOR) and not name.startswith(_TRUE_ONES)}


def _symbols(path: Path, *options: str) -> set[str]:
    lines = _run(["nm", *options, str(path)]).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.split()[-2:-1] in (["U"], ["T"])}


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise Missing(f"{command[0]} is needed (Debian: apt-get install gcc binutils)") from error
    except subprocess.CalledProcessError as error:
        raise Missing(f"{' '.join(command)}: {error.stderr}") from error
