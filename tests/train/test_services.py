"""Training from Google's, Azure's and Hugging Face's stores through their own clients: the bits of a local folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest
import yaml

from data_prep.manifest import Manifest
from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from data_prep.remote import RemoteStore
from tests.faulty_server import Faults
from tests.services import Service, service
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer

SHARD_SAMPLES = 300
SEED = 7


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local")
    prepare_splits("digits", out, PrepOptions(workers=1, shard_samples=SHARD_SAMPLES))
    return out


@pytest.fixture(scope="module")
def folder(local: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trainings run, with their recipe."""
    folder = tmp_path_factory.mktemp("training")
    path = write_recipe(local, folder, augment=False)
    tree = yaml.safe_load(path.read_text())
    tree["train"] |= {"epochs": "9steps", "log_every": "3steps"}
    tree["eval"]["every"] = "9steps"
    path.rename(folder / "recipe.yaml")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """All three, and the environment of a shell that can reach them."""
    with ExitStack() as stack:
        made = {
            kind: stack.enter_context(service(kind, tmp_path_factory.mktemp(kind))) for kind in ("gs", "abfs", "hf")
        }
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("ROOKERY_STORE_SECONDS", "20")
        for one in made.values():
            for name, value in one.variables.items():
                patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def forks(folder: Path, services: dict[str, Service]) -> Iterator[ForkServer]:
    with ForkServer(folder) as server:
        server.train(folder / "recipe.yaml", "name=local", nproc=2)
        yield server


def weights(folder: Path, name: str) -> str:
    return hashlib.sha256((folder / "runs" / name / "final" / "model.safetensors").read_bytes()).hexdigest()


def stored(kept: Service, forks: ForkServer, local: Path) -> str:
    """The digits in the store: prepared into it, or laid there where it can't be written."""
    out = f"{kept.address}/digits"
    prep = ("prep", "digits", out, "--workers", 1, "--shard-samples", SHARD_SAMPLES)
    if kept.files is not None:
        said = forks.command(forks.folder, *prep, check=2).stderr
        assert f"rookery: {out}" in said and "can't be written" in said and "Traceback" not in said
        shutil.copytree(local, kept.files / "digits")
        return out
    kept.network.fault = faults = Faults(SEED, failing=0.1)
    forks.command(forks.folder, *prep)
    assert len(faults.made) > 2
    return out


@pytest.mark.parametrize("kind", ["gs", "abfs", "hf"])
def test_weights_are_those_of_a_folder(
    kind: str,
    services: dict[str, Service],
    local: Path,
    folder: Path,
    forks: ForkServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prepared, verified, trained by two processes with loaders, evaluated; every twentieth request fails."""
    kept = services[kind]
    out = stored(kept, forks, local)
    monkeypatch.setitem(fsspec.config.conf, kind, kept.options)
    for split in ("train", "test"):
        manifest = (local / split / "manifest.json").read_bytes()
        assert RemoteStore(f"{out}/{split}").read("manifest.json") == manifest
    kept.network.fault = faults = Faults(SEED, failing=0.05)
    said = forks.command(folder, "verify", out)
    assert said.stdout == "test, train: everything is as it was made\n"
    assert all(line.startswith("verify ") for line in said.stderr.splitlines()), said.stderr
    cache, recipe = tmp_path / "cache", folder / "recipe.yaml"
    remote = (f"data.train={out}/train", f"data.val={out}/test", "data.workers=1", f"data.cache={cache}")
    before = forks.log.stat().st_size
    forks.train(recipe, f"name={kind}", *remote, nproc=2)
    assert weights(folder, kind) == weights(folder, "local")
    assert "Traceback" not in forks.log.read_text()[before:]
    files = {hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.iterdir() if len(path.name) == 64}
    assert {shard.sha256 for shard in Manifest.load(local / "train").shards} <= files
    assert faults.made
    forks.command(folder, "eval", folder / "runs" / kind, "--workers", 0)
    kept.network.fault = lambda request: "denied"
    done = forks.command(folder, "train", recipe, "name=denied", *remote, "--nproc", 2, check=2)
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"rookery: {out}/train/manifest.json: access denied")
