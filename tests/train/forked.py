"""Trainings and commands in processes forked from one that has done all imports: a start takes a second, not ten.

Everything else is the real thing: separate processes, their own process group, real signals. Trainings have no
launcher; what that adds is tested with commands.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train.commands import environment


class ForkServer:
    """A process that forks trainings on demand. Use as a context manager.

    Args:
        folder: the working directory of the trainings; what they print goes to `log` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"

    def __enter__(self) -> ForkServer:
        folder, command = self.folder, [sys.executable, "-m", __name__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment(), stdin=pipe, stdout=pipe, text=True)
        assert self._ask({"hello": None}) == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def start(self, recipe: Path, *overrides: str, nproc: int = 1) -> Job:
        """Start a training."""
        return Job(self, self._ask({"recipe": str(recipe), "overrides": overrides, "nproc": nproc}))

    def train(self, recipe: Path, *overrides: str, nproc: int = 1) -> None:
        """Train to the end."""
        statuses = self.start(recipe, *overrides, nproc=nproc).wait()
        assert statuses == [0] * nproc, f"exit statuses {statuses}\n{self.log.read_text()[-5000:]}"

    def command(
        self, folder: Path, *arguments: object, check: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `rookery` in a folder and expect the exit status `check`.

        Args:
            env: the environment, if not `tests.train.commands.environment`.
        """
        words, env = [str(argument) for argument in arguments], environment() if env is None else dict(env)
        with tempfile.TemporaryDirectory() as files:
            out, err = Path(files, "out"), Path(files, "err")
            pid = self._ask({"command": words, "folder": str(folder), "out": str(out), "err": str(err), "env": env})
            [status] = self._ask({"wait": [pid]})
            done = subprocess.CompletedProcess(["rookery", *words], status, out.read_text(), err.read_text())
        assert status == check, f"exit status {status}\n{done.stdout}\n{done.stderr}"
        return done

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the fork server ended\n{self.log.read_text()[-5000:] if self.log.exists() else ''}"
        return json.loads(answer)


@dataclass
class Job:
    """The processes of a training."""

    server: ForkServer
    pids: list[int]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes; finished ones don't mind."""
        if number == signal.SIGKILL:  # at once: else the second may see the first one die, and end by itself
            for pid in self.pids:
                os.kill(pid, signal.SIGSTOP)
        for pid in self.pids:
            os.kill(pid, number)

    def alive(self) -> bool:
        """Whether the first process has not ended."""
        return Path(f"/proc/{self.pids[0]}/exe").exists()

    def wait(self) -> list[int]:
        """The exit statuses; negative numbers are signals."""
        return self.server._ask({"wait": self.pids})


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # as `import_deepspeed` does
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # and with it the compiler, at the first start
    import timm  # noqa: F401
    import torch
    import torch._dynamo  # which torch's convolutions and optimizers import when they are first used
    import torchmetrics.image.fid
    import torchmetrics.image.inception  # noqa: F401

    import launch.cli
    import launch.dry_run
    import launch.workers  # noqa: F401
    import pipeline.config_load
    import pipeline.data.fast.randaugment  # loads what it compiled before
    import pipeline.models.bert  # and with it transformers
    import pipeline.train.engines.deepspeed
    import pipeline.train.engines.fsdp
    import pipeline.train.explained
    import pipeline.train.loop
    import pipeline.train.process
    import pipeline.train.tasks.classify
    import pipeline.train.tasks.generate
    import pipeline.train.tasks.language  # noqa: F401

    del sys.modules["mlflow"]
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # A training collects garbage by hand, which takes half a second among all these modules' objects.
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = "ready"
        if "recipe" in request:
            answer = _fork(request["recipe"], request["overrides"], request["nproc"])
        elif "command" in request:
            answer = _fork_command(
                request["command"], request["folder"], request["out"], request["err"], request["env"]
            )
        elif "wait" in request:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        print(json.dumps(answer), file=answers, flush=True)


def _fork(recipe: str, overrides: list[str], nproc: int) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent, pids = os.getpid(), []
    for rank in range(nproc):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ROOKERY_AGENT_PID": agent}
            os.environ.update({key: str(value) for key, value in place.items()})
            os._exit(_train(recipe, overrides))
        pids.append(pid)
    return pids


def _fork_command(words: list[str], folder: str, out: str, err: str, env: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    from launch.cli import app

    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["rookery", *words]
    status: Any = 1
    try:
        app()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(recipe: str, overrides: list[str]) -> int:
    from pipeline.config_load import load_config
    from pipeline.train.loop import train
    from pipeline.train.process import run_process

    sys.stdin.close()
    try:
        config = load_config(recipe, overrides)
        return run_process(lambda world: train(config, world), 1)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve()
