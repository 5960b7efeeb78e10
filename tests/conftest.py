"""Fixtures every room's tests share."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.idle_gpu.build import Missing, environment

# Tests run three at a time: threads of one would wait for those of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background of a shell ignores Ctrl-C, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REQUIRE_ALL = os.environ.get("ROOKERY_REQUIRE_ALL") == "1"


def missing(reason: str) -> None:
    """Skip the test, or fail it where nothing may be missing (`ROOKERY_REQUIRE_ALL=1`, as in CI)."""
    if REQUIRE_ALL:
        pytest.fail(f"{reason} (ROOKERY_REQUIRE_ALL=1 allows no test to be left out)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real test images: `cifar10/*.parquet` and `imagenet-sample/<wnid>/*.JPEG`."""
    folder = os.environ.get("ROOKERY_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        missing("real images left out: set ROOKERY_TEST_DATA to a folder with cifar10/ and imagenet-sample/")
    return Path(str(folder))


@pytest.fixture(scope="session")
def idle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that shall see a GPU, one that computes nothing."""
    try:
        return environment(tmp_path_factory.mktemp("idle-gpu"))
    except Missing as error:
        missing(f"idle GPU left out: {error}")
        raise


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in this folder, so that it can be filled.

    Args:
        size: such as "200k" or "8m".
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        missing("full disk left out: mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# Files that take minutes come first, so that short ones fill the gaps at the end, when several processes share the
# work. Clusters, which wait for much, run beside trainings, which wait for nothing.
_LONG = (
    "cluster/test_slurm",
    "train/test_cifar10",
    "cluster/test_ray.py",
    "train/test_chaos",
    "train/test_resume",
    "train/test_engines",
    "cluster/",
    "test_recipes",
    "train/test_restart",
    "models/test_every_model",
    "test_demo",
    "tracking/test_mlflow_server",
    "export/test_onnx",
    "train/test_watchdog",
    "train/test_interrupt",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((i for i, start in enumerate(_LONG) if path.startswith(start)), len(_LONG))

    items.sort(key=place)
