"""A store that gives no answer: nobody's mistake, so processes are started again, and a sweep's trial too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import cli
from pipeline.data.batches import Failed
from pipeline.errors import Unreachable, UserError
from pipeline.train import again
from tests.faulty_server import Fault, FaultyServer, Request, folder
from tests.train.commands import command, environment
from tests.train.conftest import write_recipe
from tests.train.forked import ForkServer


def recipe(digits: Path, path: Path) -> Path:
    """A run that reads its shards one after the other."""
    recipe = write_recipe(digits, path, augment=False)
    tree = yaml.safe_load(recipe.read_text())
    tree["data"] |= {"lanes": 4, "window": 16}
    tree["train"] |= {"epochs": "12steps", "log_every": "6steps"}
    tree["checkpoint"]["every"] = "12steps"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def test_a_run_goes_on_after_it(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(digits, tmp_path)
    monkeypatch.setenv("ROOKERY_STORE_TRIES", "1")
    log = tmp_path / "log"
    with FaultyServer(folder(digits)) as server, log.open("w") as out:

        def outage(request: Request) -> Fault | None:
            """From the third shard on, until somebody has given up."""
            is_there = not request.path.endswith(".tar") or server.asked(".tar") < 3 or "no success" in log.read_text()
            return None if is_there else "busy"

        server.fault = outage
        options = (f"data.train={server.uri}/train", f"data.cache={tmp_path / 'cache'}", "data.workers=1")
        arguments = command("train", path, "name=outage", *options, "--nproc", 2)
        done = subprocess.run(arguments, cwd=tmp_path, env=environment(), stdout=out, stderr=out, timeout=300)
    assert done.returncode == 0, log.read_text()
    assert "no success in 1 tries" in log.read_text()
    assert "ended with status 1; 3 of 3 restarts left" in log.read_text()
    with ForkServer(tmp_path) as forked:
        forked.train(path, "name=clean", nproc=2)
    outage_, clean = (tmp_path / "runs" / name / "final" / "model.safetensors" for name in ("outage", "clean"))
    assert outage_.read_bytes() == clean.read_bytes()


def test_its_status_is_that_of_a_failure(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOKERY_STORE_TRIES", "1")
    path = recipe(digits, tmp_path)
    with FaultyServer(folder(digits), lambda request: "busy") as server:
        monkeypatch.setattr("sys.argv", ["rookery", "train", str(path), f"data.train={server.uri}/train"])
        with pytest.raises(SystemExit) as ended:
            cli.app()
    assert ended.value.code == Unreachable.status == 1 and UserError.status == 2


def test_loaders_tell_it_from_a_mistake() -> None:
    assert Failed.of(Unreachable("no answer")) == Failed("no answer", True)
    assert Failed.of(UserError("a mistake")) == Failed("a mistake", False)


@pytest.mark.parametrize("may_pass", [False, True])
def test_only_what_may_pass_leaves_no_status(may_pass: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stuck ends with the same number, and is not to be started again."""

    def run(job: str) -> int:
        if may_pass:
            again.hope()
        return 1

    monkeypatch.setattr(again, "_may_pass", False)
    monkeypatch.setattr(again, "import_module", lambda name: type("module", (), {"run": staticmethod(run)}))
    monkeypatch.setenv(again.FOLDER, str(tmp_path))
    monkeypatch.setenv(again.JOB, json.dumps({}))
    assert again.work("job") == 1
    assert again.chosen_status() == (None if may_pass else 1)
