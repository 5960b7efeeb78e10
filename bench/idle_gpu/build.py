"""Compile the idle GPU, and the environment in which programs find it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import tempfile
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
    """Compile the library below a folder, where it may be already; returns its path.

    Raises:
        Missing: this PyTorch is not for CUDA, there is no C compiler, or no library can be preloaded from there.
    """
    sources = b"".join(path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".c", ".py"))
    made_of = hashlib.sha256(sources + importlib.metadata.version("torch").encode()).hexdigest()[:12]
    folder = folder.resolve() / made_of
    library = folder / "libcuda.so.1"  # the name under which the driver is asked for
    if any(mark in str(library) for mark in " :"):
        raise Missing(f"{folder}: LD_PRELOAD can't name a file whose path has spaces or colons; choose another folder")
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = _compiled(Path(work), library.name)
        made.replace(library)
    return library


def _compiled(folder: Path, name: str) -> Path:
    includes = [f"-I{path}" for path in _includes()]
    compiler = ["gcc", "-O2", "-w", "-fPIC"]
    for part in ("device", "libraries"):
        _run([*compiler, *includes, "-c", str(_SOURCES / f"{part}.c"), "-o", str(folder / f"{part}.o")])
    ours = set().union(*(_symbols(folder / f"{part}.o", "--defined-only") for part in ("device", "libraries")))
    asked = set(_OF_TRITON).union(*map(_asked_for, _torch_libraries()))
    rest = [
        f"int {symbol}(void) {{ {'idle_gpu_launch(); ' if _COMPUTES.search(symbol) else ''}return 0; }}"
        for symbol in sorted(asked - ours)
    ]
    (folder / "rest.c").write_text("\n".join(["void idle_gpu_launch(void);", *rest, ""]))
    _run([*compiler, "-c", str(folder / "rest.c"), "-o", str(folder / "rest.o")])
    objects = [str(folder / f"{part}.o") for part in ("device", "libraries", "rest")]
    _run(["gcc", "-shared", f"-Wl,-soname,{name}", *objects, "-o", str(folder / name), "-lpthread", "-ldl"])
    return folder / name


def environment(folder: Path) -> dict[str, str]:
    """Variables for a program that shall see the idle GPU; kernels are compiled into the folder as well."""
    library = build(folder)
    return {
        "LD_PRELOAD": str(library),
        "PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK": "1",
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(library.parent / "inductor"),
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
    except (FileNotFoundError, PermissionError) as error:
        raise Missing(f"{command[0]} is needed (Debian: apt-get install gcc binutils)") from error
    except subprocess.CalledProcessError as error:
        raise Missing(f"{' '.join(command)}: {error.stderr}") from error
