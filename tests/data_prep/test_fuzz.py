"""Sources that are damaged or made to do harm: each is refused with a reason, or its bad parts are in the quarantine.

No crash, no hang, no memory without bound, and not a file outside of the target. `ROOKERY_FUZZ_SEED` draws others.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.prepare import prepare_splits
from data_prep.verify import verify
from tests.data_prep.fuzz_cifar import CIFAR
from tests.data_prep.fuzz_folders import FILES, FOLDERS
from tests.data_prep.fuzz_ilsvrc import ILSVRC_TRAIN, ILSVRC_VAL
from tests.data_prep.fuzz_images import DAMAGED, ODD, REFUSED
from tests.data_prep.fuzz_parquet import PARQUET
from tests.data_prep.helpers import encoded, image_of, options, pixels, read_plain
from tests.fuzzing import SEED, bounded, tree

ROOT = Path(__file__).resolve().parents[2]
GOOD = {f"{name}/{number}.jpg": encoded(pixels(number)) for name in ("ant", "bee") for number in range(2)}


class Outcome(NamedTuple):
    """What a preparation came to: a message that refuses the source, or a manifest."""

    refused: str
    manifest: Manifest | None


@pytest.fixture(scope="module", autouse=True)
def seed() -> None:
    print(f"ROOKERY_FUZZ_SEED={SEED}")


def prepared(source: Path, out: Path, **changes: object) -> list[Outcome]:
    """Prepare a source with everything watched, and check what was made."""
    top = out.parent
    before = tree(top, without=out)
    outcome = [Outcome("", None)]
    with bounded():
        try:
            manifests = prepare_splits(source, out, options(**changes))
            outcome = [Outcome("", manifest) for manifest in manifests.values()]
        except UserError as error:
            outcome = [Outcome(str(error), None)]
            assert len(str(error)) > 20 and "\0" not in str(error)
    assert tree(top, without=out) == before
    for _, manifest in outcome:
        if manifest is not None:
            check_made(out / manifest.split, manifest)
    return outcome


def check_made(split: Path, manifest: Manifest) -> None:
    """What was made is whole: it is as the manifest says, and every sample can be decoded."""
    assert verify(split) == []
    samples = read_plain(split)
    assert len(samples) == manifest.num_samples
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    for sample in samples:
        assert 0 <= int(sample["cls"]) < manifest.num_classes
        Image.open(io.BytesIO(image_of(sample)), formats=("JPEG", "PNG", "WEBP")).load()


def with_image(folder: Path, data: bytes) -> Path:
    """Class folders with two good pictures each, and this one."""
    for name, good in {**GOOD, "ant/evil.jpg": data}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(good)
    return folder


# --- pictures


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_image(name: str, tmp_path: Path) -> None:
    source = with_image(tmp_path / "source", REFUSED[name]())
    [(refused, manifest)] = prepared(source, tmp_path / "out")
    assert not refused and manifest is not None and manifest.num_samples == 4
    [bad] = manifest.quarantine
    assert (bad.source, bad.action) == ("ant/evil.jpg", "dropped") and len(bad.reason) > 5


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [*DAMAGED, *ODD])
def test_damaged_image(name: str, tmp_path: Path) -> None:
    """Whether enough of it is left to see a picture or not, it is either in the shards or in the quarantine."""
    data = (DAMAGED | ODD)[name]()
    [(refused, manifest)] = prepared(with_image(tmp_path / "source", data), tmp_path / "out")
    assert not refused and manifest is not None
    dropped = [bad.source for bad in manifest.quarantine if bad.action == "dropped"]
    assert dropped == ["ant/evil.jpg"] * (5 - manifest.num_samples)


# --- folders, archives, tables

SOURCES = {
    f"{group}: {name}": make
    for group, makes in (
        ("folder", FOLDERS),
        ("file", FILES),
        ("train", ILSVRC_TRAIN),
        ("val", ILSVRC_VAL),
        ("cifar", CIFAR),
        ("parquet", PARQUET),
    )
    for name, make in makes.items()
}
# Damage drawn at random may hit what nobody reads, or pixels alone.
DRAWN = re.compile(r"\b(cut|flipped|header|zeroed|spliced|footer)\b( \d| again| once more)?$")
# Odd, but nothing in it is bad: what names lead to is never opened, and what links lead to is a picture.
KEPT = {
    "folder: name that is not UTF-8",
    "folder: class that is not UTF-8",
    "folder: name with line feeds and escapes",
    "folder: name of 255 bytes",
    "folder: name like an option",
    "folder: same name in other case",
    "folder: same stem",
    "folder: link to a file outside",
    "folder: link to a folder outside",
    "folder: 500 folders deep",
    "folder: class without pictures",
    "folder: hard link",
    "train: class without pictures",
    "train: class named up",
    "train: class of an absolute name",
    "train: picture named up",
    "train: picture of an absolute name",
    "train: picture twice",
    "train: name that is not UTF-8",
    "train: folder",
    "val: packed devkit",
    "val: packed devkit named up",
    "cifar: names that lead up",
    "parquet: names that lead up",
    "parquet: names as a number",
    "parquet: metadata that is no JSON",
    "parquet: metadata that is a list",
    "parquet: metadata in 100,000 brackets",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SOURCES)
def test_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "made"
    made.mkdir()
    outcome = prepared(SOURCES[name](made), tmp_path / "out")
    assert not any(Path(path).name.startswith(("evil", "rookery")) for path in tree(tmp_path, without=made))
    bad = any(refused or (manifest is not None and manifest.quarantine) for refused, manifest in outcome)
    assert DRAWN.search(name) or bad == (name not in KEPT), outcome


def test_there_are_enough() -> None:
    assert len(REFUSED) + len(DAMAGED) + len(ODD) + len(SOURCES) > 200 and SOURCES.keys() >= KEPT


# --- by the command line

COMMANDS = (
    ("folder: bad picture with a name of escapes", 0, r"ant/\\x1b]0;x\\x07\\n.jpg: not an image"),
    ("folder: bad picture whose name is not UTF-8", 0, r"ant/\\udcff.jpg: not an image"),
    ("folder: link to a pipe", 0, r"ant/p.jpg: not a regular file \(dropped\)"),
    ("train: size below nothing", 2, r"rookery: .*damaged header at byte 0 \(size -1024\)"),
    ("cifar: batch runs a program", 2, r"rookery: .*it asks for posix.system"),
    ("parquet: label of 10^12", 2, r"rookery: .*label goes up to 1000000000000"),
)


@pytest.mark.parametrize(("name", "status", "said"), COMMANDS)
def test_command(name: str, status: int, said: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    source = SOURCES[name](made)
    before = tree(tmp_path, without=tmp_path / "out")
    # An output that can't take every character, as in many jobs.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from launch.cli import app; app()", "prep", source, "out", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert re.search(said, done.stderr if status else done.stdout), (done.stdout, done.stderr)
    assert tree(tmp_path, without=tmp_path / "out") == before
