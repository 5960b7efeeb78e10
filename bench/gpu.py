"""The work of bench/gpu.sh: which parts, in which order, and in which process of `bench.gpu_parts`.

One process takes all of them while none fails. What fails, crashes or hangs ends its process, and another one goes on:
after an illegal access of a kernel the first has no GPU any more.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu_parts import CHECKS, KERNEL_CHECKS, NAMES, has_opt_in, there_is, write
from launch.bench_model.measure import tell

WORKER = [sys.executable, str(Path(__file__).parent / "gpu_parts.py")]
# Seconds that a part may take: what hangs shouldn't use up a call, and most likely to hang are kernels that never ran.
LONGEST, LONGEST_CHECKS = 420.0, 180.0


class Ended(NamedTuple):
    """How a process ended: the parts that it did, and the one that it didn't get done, with the reason."""

    done: Sequence[str]
    failed: str | None = None
    why: str = ""


def main() -> int:
    """Work on the parts that were asked for while there is time; 1 if any fails or is left out."""
    parser = argparse.ArgumentParser(description="Measure this package's models on a GPU; see bench/gpu.sh.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--minutes", type=float, default=8.5, help="no part is begun after two thirds of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not options.tiny:
        parser.error("there is no GPU here; --tiny tries the script on a CPU")
    waiting = options.only.split(",")
    for name in waiting:
        if name not in NAMES:
            parser.error(f"--only {name}: there is {', '.join(NAMES)}")
    plain: set[str] = set()  # parts without opt-in kernels
    until, status = time.monotonic() + 40 * options.minutes, 0
    while waiting := [name for name in waiting if there_is(name, options.tiny, gpu, name in plain)]:
        arguments = ["--out", str(options.out), "--command", shlex.join(["bench/gpu.sh", *sys.argv[1:]])]
        arguments += ["--tiny"] * options.tiny + [f"--plain={name}" for name in plain]
        arguments += [f"--seconds={until - time.monotonic():.1f}"]
        ended = process([*WORKER, *waiting, *arguments])
        waiting = [name for name in waiting if name not in ended.done]
        if ended.failed is None:
            break
        waiting.remove(ended.failed)
        status = 1
        tell(f"{ended.failed} failed: {ended.why}")
        note(options.out / f"model_{ended.failed}.json", ended.why)
        if ended.failed == CHECKS:
            tell("the fast paths are wrong, nothing is measured")
            return 1
        if ended.failed == KERNEL_CHECKS:
            tell("opt-in kernels are wrong, what has them is left out")
            plain |= set(NAMES)
        elif has_opt_in(ended.failed, options.tiny) and ended.failed not in plain:
            plain.add(ended.failed)
            waiting.insert(0, ended.failed)
    for name in waiting:
        tell(f"no time left for {name}: run it by --only {name}")
    return 1 if waiting else status


def process(command: Sequence[str]) -> Ended:
    """Let a process work, and end it if a part of its takes too long."""
    done: list[str] = []
    at, why = "", ""
    # A session of its own, so that compilers that it has started end with it: they hold its pipe, too.
    with ending(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)) as worker:
        assert worker.stdout is not None
        found = lines(worker.stdout)
        longest = LONGEST
        try:
            while line := found.get(timeout=longest):
                word, _, name = line.strip().partition(" ")
                if word == "begin":
                    tell(name)
                    at, longest = name, LONGEST_CHECKS if name == KERNEL_CHECKS else LONGEST
                elif word == "end":
                    done.append(name)
                    at = ""
                elif word == "failed":
                    why = name
        except queue.Empty:
            end(worker)
            why = f"took more than {longest:.0f} s"
        code = worker.wait()
    if code == 0:
        return Ended(done)
    if not at:
        raise SystemExit(f"bench/gpu.sh: the process that measures ended with {code} outside of its parts")
    return Ended(done, at, why or f"its process ended with {code}")


@contextmanager
def ending(worker: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Whatever ends this process, be it the time limit of the script, ends that one and what it has started."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: sys.exit(1)) for number in signals]
    try:
        yield worker
    finally:
        end(worker)
        worker.wait()
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def end(worker: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def lines(stream: Iterable[str]) -> queue.Queue[str]:
    """Those of a pipe as they come, each with its end; behind the last one nothing."""
    found: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            found.put(line)
        found.put("")

    threading.Thread(target=read, daemon=True).start()
    return found


def note(path: Path, why: str) -> None:
    """Add to a part's report, if it got that far, that it failed."""
    report = json.loads(path.read_text()) if path.exists() else {}
    write(path, report | {"failed": why})


if __name__ == "__main__":
    sys.exit(main())
