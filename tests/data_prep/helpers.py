"""Small sources made on the spot, and what to look at in the result."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.options import PrepOptions

TEXT = b"this is not an image\n"


def options(**changes: Any) -> PrepOptions:
    """Small shards, made in this process unless the test says otherwise."""
    return PrepOptions(**{"workers": 1, "shard_samples": 4, **changes})


def pixels(seed: int, width: int = 40, height: int = 30, channels: int = 3) -> np.ndarray:
    """Smooth random colours, so that JPEG neither blows up nor collapses; (height, width, channels) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(coarse if channels > 1 else coarse[..., 0])
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def encoded(array: np.ndarray, kind: str = "JPEG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def make_folder(root: Path, classes: Sequence[str] = ("ant", "bee", "cat"), per_class: int = 5, size: int = 40) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            data = encoded(pixels(100 * label + number, size, size * 3 // 4))
            (root / name / f"{Path(name).name} {number}.v1.jpg").write_bytes(data)
    return root


def make_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tar_bytes(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every visible file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }


def read_plain(directory: Path, decode: str | None = None) -> list[dict[str, Any]]:
    """Every sample of a split, by plain `webdataset`, in the order of the shards."""
    import webdataset

    shards = sorted(str(path) for path in directory.glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False)
    return list(dataset.decode(decode) if decode else dataset)


def image_of(sample: Mapping[str, Any]) -> Any:
    """The image of a raw or decoded sample, whatever its extension."""
    [extension] = [name for name in sample if name in ("jpg", "png", "webp")]
    return sample[extension]


def exits_after(step: int, counted: Sequence[str]) -> None:
    """Let this process end like a kill -9 when the functions of `os` named here are called for the `step`-th time."""
    calls = 0

    def wrap(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in counted:
        setattr(os, name, wrap(getattr(os, name)))


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the path exists or the process has ended."""
    deadline = time.monotonic() + 30
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def kill(process: subprocess.Popen[bytes], whole_group: bool) -> bool:
    """kill -9 of a process, which leads a group, alone or with its group; False if it had ended before."""
    if process.poll() is not None:
        return False
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    return True
