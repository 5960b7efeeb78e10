"""Contenders measured in turn: each lives in a process of its own, and only one of them works at a time."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from launch.bench_loader.contender import Contender, Settings, timed
from launch.bench_loader.scene import Scene
from launch.deaf import deaf_to_ctrl_c


def contenders(recipe: str, scene: Scene, peers: bool = True) -> tuple[list[Contender], list[str]]:
    """Those that do a recipe, can be imported here and read what there is; and who is left out, and why.

    The first is this project's loader on the shards that the user has.
    """
    from launch.bench_loader.ours import OURS
    from launch.bench_loader.peers import PEERS

    ours = sorted(OURS, key=lambda contender: getattr(scene, contender.reads) != scene.own)
    able = [contender for contender in [*ours, *(PEERS if peers else [])] if recipe in contender.recipes]
    here, left_out = [], []
    for contender in able:
        if contender.package is not None and importlib.util.find_spec(contender.package) is None:
            left_out.append(f"{contender.name} (no package {contender.package})")
        elif getattr(scene, contender.reads) is None:
            left_out.append(f"{contender.name} ({scene.missing})")
        else:
            here.append(contender)
    return here, left_out


def measure(
    settings: Settings, chosen: list[Contender], repeats: int, told: Callable[[str], None]
) -> dict[str, list[dict[str, float]] | str]:
    """The figures of every contender's rounds, or why it has none.

    Rounds are interleaved: the first of all, the second of all, ... so that a machine that gets slower or busier hits
    everybody alike. The epoch before the first round, which compiles and fills the page cache, doesn't count.
    """
    crew = {contender.name: _Process(contender, settings) for contender in chosen}
    found: dict[str, list[dict[str, float]] | str] = {name: [] for name in crew}
    try:
        for turn in range(-1, repeats):
            for name, process in crew.items():
                rounds = found[name]
                if isinstance(rounds, str):
                    continue
                told(f"{'warm-up' if turn < 0 else f'round {turn + 1} of {repeats}'}: {name}")
                answer = process.round()
                if isinstance(answer, str):
                    found[name] = answer
                elif turn >= 0:
                    rounds.append(answer)
    except KeyboardInterrupt:
        for process in crew.values():
            process.kill()  # to end by themselves they would have to come to the end of an epoch
        raise
    finally:
        for process in crew.values():
            process.end()
    return found


class _Process:
    def __init__(self, contender: Contender, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        # Not a daemon: those may not start loader processes.
        self._process = context.Process(target=_serve, args=(theirs, contender.name, settings))
        with deaf_to_ctrl_c():
            self._process.start()
        theirs.close()

    def round(self) -> dict[str, float] | str:
        try:
            self._ours.send("round")
            return self._ours.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            return f"its process ended with status {self._process.exitcode}"

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._ours.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, name: str, settings: Settings) -> None:
    """A contender's process: one epoch for every word that comes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(os.devnull, "w") as nowhere:  # some of them print their settings
        sys.stdout = nowhere
        [contender] = [c for c in contenders(settings.recipe, settings.scene)[0] if c.name == name]
        start: Callable[[], Any] | None = None
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            try:
                start = start or contender.epochs(settings)
                answer: dict[str, float] | str = timed(iter(start()), settings.warmup)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                answer = f"{type(error).__name__}: {error}"
            connection.send(answer)
