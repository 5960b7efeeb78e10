"""What a step costs while the MLflow server answers, answers late, or is gone: the phases of one training in turn.

    python -m bench.tracking [--cycles 5] [--seconds 20]

Run it in the repository's root. It shards the digits, starts a server of its own, and trains a small NesT with one
process and one thread, as phases that differ in nothing but the server. A step's length is told on a clock that stands
still while the training waits for a core, since other programs take cores away for reasons of their own; on a machine
that does nothing else that is the time on the wall. Prints the median over the cycles, the ratio to the same cycle's
phase with a server that answers, and the longest step on the wall; and what the training itself does for each line
that is uploaded.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.tracking.metrics import MetricsLog, read_metrics
from tests.tracking.conftest import MlflowServer, SlowProxy, wait_for
from tests.tracking.step_cost import Mark
from tests.train.commands import command, environment
from tests.train.conftest import write_recipe

# Delay of every call in seconds; None: connections are closed at once.
PHASES = {"answers": 0.0, "2 s per call": 2.0, "gone": None}
# A phase begins with what the one before it left: calls that wait, lines to catch up with.
SETTLE = 3.0


@dataclass(frozen=True)
class Phase:
    step_seconds: float
    first: int
    last: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a phase")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rookery-") as name:
        folder = Path(name)
        prepare_splits("digits", folder / "digits", PrepOptions(workers=1))
        server = MlflowServer(folder)
        server.start()
        try:
            report(*measure(folder, server, options.cycles, options.seconds))
            report_lines(line_seconds(folder / "lines.jsonl"))
        finally:
            server.stop()


def measure(folder: Path, server: MlflowServer, cycles: int, seconds: float) -> tuple[list[Phase], dict[int, float]]:
    """Train through all phases; returns them in turn, and the length of every step on the wall."""
    proxy, run, phases = SlowProxy(server.port, delay=0.0), folder / "runs" / "run", []
    lengths = ("train.epochs=10000000steps", "eval.every=10000000steps", "checkpoint.every=10000000steps")
    rest = ("train.log_every=1steps", "tracking.mlflow=true", f"tracking.uri={proxy.uri}")
    arguments = (write_recipe(folder / "digits", folder, augment=False), *lengths, *rest)
    training = subprocess.Popen(
        command("train", *arguments, "--threads", 1), cwd=folder, env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: proxy.received > 20, 300, "the upload")
        for _ in range(cycles):
            for delay in PHASES.values():
                proxy.refuses, proxy.delay = delay is None, delay or 0.0
                time.sleep(SETTLE)
                before = Mark.of(run)
                time.sleep(seconds)
                after = Mark.of(run)
                phases.append(Phase(before.step_seconds(after), before.step, after.step))
    finally:
        training.send_signal(signal.SIGINT)
        training.wait()
        proxy.close()
    return phases, {line["step"]: line["step_seconds"] for line in read_metrics(run) if line["kind"] == "train"}


def report(phases: list[Phase], lengths: dict[int, float]) -> None:
    count = len(PHASES)
    print(f"{'server':14} {'step':>11} {'ratio to answers: median (range)':>36} {'longest step':>13} {'steps':>7}")
    for i, name in enumerate(PHASES):
        own = phases[i::count]
        ratios = [phase.step_seconds / phases[j * count].step_seconds for j, phase in enumerate(own)]
        spread = f"{statistics.median(ratios):.4f} ({min(ratios):.4f} ... {max(ratios):.4f})"
        length = statistics.median(phase.step_seconds for phase in own) * 1e3
        steps = [step for phase in own for step in range(phase.first + 1, phase.last + 1)]
        longest = max(lengths[step] for step in steps) * 1e3
        print(f"{name:14} {length:8.3f} ms {spread:>36} {longest:10.1f} ms {len(steps):7}")


def line_seconds(path: Path, lines: int = 5000) -> list[float]:
    """How long a training is busy with each line of its metrics: all else about the upload is another process."""
    metrics, found = MetricsLog(path), []
    values = dict.fromkeys(("loss", "lr", "grad_norm", "images_per_second", "step_seconds", "wait_share"), 0.123456789)
    for step in range(lines):
        start = time.perf_counter()
        metrics.log("train", step, samples=48 * step, epoch=step / 30, **values)
        found.append(time.perf_counter() - start)
    metrics.close()
    return sorted(found)


def report_lines(seconds: list[float]) -> None:
    median, late = seconds[len(seconds) // 2] * 1e6, seconds[len(seconds) * 99 // 100] * 1e6
    print(f"a line: median {median:.0f} us, 99 % within {late:.0f} us, longest {seconds[-1] * 1e6:.0f} us")


if __name__ == "__main__":
    main()
