"""The cluster files hold before Ray's own schema, without a cloud, and what they copy and install is there."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config_load import load_config
from tests.conftest import missing
from tests.recipe_cases import RECIPES
from tests.train.commands import ROOT

FOLDER = ROOT / "configs" / "ray"
CLOUDS = ("aws", "gcp")
ALL = (*CLOUDS, "onprem")

Tree = dict[str, Any]


@cache
def parsed(name: str) -> Tree:
    tree: Tree = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return tree


def read(name: str) -> Tree:
    return copy.deepcopy(parsed(name))


def validated(tree: Tree) -> Tree:
    """What `ray up` makes of a cluster file before it asks the cloud: defaults filled in, schema checked."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled: Tree = prepare_config(copy.deepcopy(tree))
    validate_config(filled)
    return filled


@pytest.mark.parametrize("name", ALL)
def test_ray_accepts(name: str) -> None:
    filled = validated(read(name))
    assert filled["cluster_name"] == "rookery" and filled["idle_timeout_minutes"] == 15
    head = filled["available_node_types"][filled["head_node_type"]]
    assert name == "onprem" or head["max_workers"] == 0
    # Nothing of Ray's defaults that would install another Ray or its cloud packages is left.
    commands = [*filled["head_setup_commands"], *filled["worker_setup_commands"]]
    assert len(commands) == 2 and all("configs/ray/setup.sh" in command for command in commands)


@pytest.mark.parametrize("name", CLOUDS)
def test_limits_and_spot(name: str) -> None:
    filled = validated(read(name))
    kinds = filled["available_node_types"]
    workers = {kind: node for kind, node in kinds.items() if kind != filled["head_node_type"]}
    assert filled["max_workers"] == 4 and not filled["provider"]["cache_stopped_nodes"]
    assert all(node["min_workers"] == 0 and 0 < node["max_workers"] <= 4 for node in workers.values())
    spot = {
        "aws": lambda node: node.get("InstanceMarketOptions") == {"MarketType": "spot"},
        "gcp": lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
    }[name]
    assert {kind for kind, node in kinds.items() if spot(node["node_config"])} == set(workers)


def set_key(*path: str, value: Any = 1) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return change


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_key("max_worker"), "max_worker"),
        (set_key("auth", "ssh_usr", value="ubuntu"), "ssh_usr"),
        (set_key("available_node_types", "a100_spot", "min_worker"), "min_worker"),
        (set_key("available_node_types", "a100_spot", value={"resources": {}}), "node_config"),
        (set_key("idle_timeout_minutes", value="15m"), "15m"),
        (set_key("worker_start_ray_commands", value="ray start"), "ray start"),
        (set_key("head_node_type", value="haed"), "head_node_type"),
        (set_key("available_node_types", "a100_spot", "min_workers", value=5), "max_workers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ray_refuses(name: str, change: Callable[[Tree], None], message: str) -> None:
    tree = read(name)
    change(tree)
    with pytest.raises(Exception, match=message):
        validated(tree)


def test_ec2_knows_every_key() -> None:
    """Ray passes node_config on; its keys are compared with those of EC2's RunInstances."""
    session = pytest.importorskip("botocore.session").get_session()
    validate = pytest.importorskip("botocore.validate").ParamValidator().validate
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    counts = {"MinCount": 1, "MaxCount": 1}
    for kind, node in read("aws")["available_node_types"].items():
        assert not validate(node["node_config"] | counts, shape).has_errors(), kind
        misspelled = node["node_config"] | counts | {"InstanceMarketOption": {}}
        assert "InstanceMarketOption" in validate(misspelled, shape).generate_report()


@pytest.mark.parametrize("name", ALL)
def test_what_is_copied(name: str) -> None:
    """All packages, what installs them, and nothing that holds an environment, shards or runs."""
    mounts = read(name)["file_mounts"]
    packages = [line.parent.name for line in ROOT.glob("*/__init__.py") if line.parent.name != "tests"]
    needed = {*packages, "configs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert {local for local in mounts.values() if not local.startswith("~")} == needed
    assert all(remote == f"~/rookery/{local}" for remote, local in mounts.items() if not local.startswith("~"))
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all((ROOT / local).exists() for local in needed)


def test_common_parts_are_equal() -> None:
    for key in ("cluster_name", "file_mounts", "rsync_exclude", "idle_timeout_minutes"):
        assert all(read(name)[key] == read("aws")[key] for name in ALL), key


@pytest.mark.parametrize("name", ALL)
def test_variables_are_those_of_setup(name: str) -> None:
    said = (FOLDER / "setup.sh").read_text()
    used = re.findall(r"(ROOKERY_\w+)=", " ".join(read(name)["setup_commands"]))
    assert used and all(f"#   {variable} " in said for variable in used)


def test_setup_installs_what_every_recipe_needs() -> None:
    """The extras are those of the tasks and engines that a recipe may ask for, of the sweep, and of stores."""
    (installed,) = re.findall(r"\$\{checkout\}\[([a-z0-9,]+)\]", (FOLDER / "setup.sh").read_text())
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    of_tasks = {"classify": set(), "language": {"nlp"}, "generate": {"generate"}}
    kinds = {load_config(path).task.kind for path in RECIPES.values()}
    needed = {"ray", "s3", "deepspeed"}.union(*(of_tasks[kind] for kind in kinds))
    assert kinds == set(of_tasks) and needed == set(installed.split(",")) <= set(known)


def test_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        missing("shell scripts left out: shellcheck is not installed")
    done = subprocess.run(["shellcheck", *FOLDER.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def setup(home: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    own = {"HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run(
        ["bash", home / "rookery" / "configs" / "ray" / "setup.sh"],
        env=own | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A node to which the files were copied, with an environment at `env` and a folder for shared storage."""
    folder = tmp_path / "home" / "rookery" / "configs" / "ray"
    folder.mkdir(parents=True)
    (folder / "setup.sh").write_text((FOLDER / "setup.sh").read_text())
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "ray").write_text("#!/bin/sh\necho this is ray\n")
    (tmp_path / "env" / "bin" / "ray").chmod(0o755)
    (tmp_path / "shared").mkdir()
    (tmp_path / "home" / ".ray").mkdir()
    (tmp_path / "home" / ".ray" / "auth_token").write_text("secret")
    return tmp_path / "home"


def test_setup_with_an_environment(home: Path) -> None:
    shared, env = home.parent / "shared", home.parent / "env"
    for _ in range(2):
        done = setup(home, ROOKERY_SHARED=shared, ROOKERY_ENV=env)
        assert done.returncode == 0, done.stderr
    (home / "rookery" / "runs" / "probe").touch()
    assert (shared / "runs" / "probe").exists() and (home / "rookery" / "shards").resolve() == shared / "shards"
    assert (home / ".bashrc").read_text().count("rookery") == 1
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    asked = '. ~/.bashrc; ray; echo "$RAY_AUTH_MODE $PYTHONPATH $ROOKERY_SHARED"'
    found = subprocess.run(["bash", "-c", asked], env={"HOME": str(home), "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert found.stdout.decode() == f"this is ray\ntoken {home / 'rookery'} {shared}\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "ROOKERY_SHARED is not set"),
        ({"ROOKERY_SHARED": "/proc/nowhere"}, "can't write to /proc/nowhere; is it mounted?"),
        ({"ROOKERY_SHARED": "{}/shared", "ROOKERY_ENV": "{}/shared"}, "shared has no bin/ray"),
        ({"ROOKERY_SHARED": "{}/shared", "ROOKERY_ENV": "{}/env", "no token": "1"}, "ray get-auth-token --generate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_setup_says_what_is_missing(variables: dict[str, str], message: str, home: Path) -> None:
    if variables.pop("no token", None):
        (home / ".ray" / "auth_token").unlink()
    done = setup(home, **{name: value.format(home.parent) for name, value in variables.items()})
    assert done.returncode == 1 and message in done.stderr, done.stderr
