"""What a step costs while the MLflow server answers, answers late, or is gone: the phases of one training in turn.

    python -m bench.tracking [--cycles 5] [--seconds 20]

Run it in the repository's root. It shards the digits, starts a server of its own, and trains a small NesT with one
process and one thread. Phases of one training differ in nothing but the server, so that a percent can be seen, given a
machine that does nothing else. Prints the median step of each phase, its ratio to the same cycle's phase with a server
that answers, and the longest mean of five steps.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.tracking.metrics import read_metrics
from tests.tracking.conftest import MlflowServer, SlowProxy, wait_for
from tests.train.commands import command, environment
from tests.train.conftest import write_recipe

# Delay of every call in seconds; None: connections are closed at once.
PHASES = {"answers": 0.0, "2 s per call": 2.0, "gone": None}
# Each phase begins with what the one before it left: calls that wait, lines to catch up with.
SETTLE = 3.0


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
        finally:
            server.stop()


def measure(folder: Path, server: MlflowServer, cycles: int, seconds: float) -> tuple[Path, list[tuple[float, float]]]:
    """Train through all phases; returns the run directory, and when each phase began and ended."""
    proxy, run, spans = SlowProxy(server.port, delay=0.0), folder / "runs" / "run", []
    lengths = ("train.epochs=10000000steps", "eval.every=10000000steps", "checkpoint.every=10000000steps")
    rest = ("train.log_every=5steps", "tracking.mlflow=true", f"tracking.uri={proxy.uri}")
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
                began = time.time()
                time.sleep(seconds)
                spans.append((began, time.time()))
    finally:
        training.send_signal(signal.SIGINT)
        training.wait()
        proxy.close()
    return run, spans


def report(run: Path, spans: list[tuple[float, float]]) -> None:
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    steps = [[line["step_seconds"] * 1e3 for line in lines if first < line["time"] <= last] for first, last in spans]
    count = len(PHASES)
    print(f"{'server':14} {'median step':>12} {'ratio to answers: median (range)':>36} {'longest':>9} {'steps':>7}")
    for i, name in enumerate(PHASES):
        own = steps[i::count]
        ratios = [statistics.median(part) / statistics.median(steps[j * count]) for j, part in enumerate(own)]
        spread = f"{statistics.median(ratios):.4f} ({min(ratios):.4f} ... {max(ratios):.4f})"
        every = [value for part in own for value in part]
        print(f"{name:14} {statistics.median(every):9.3f} ms {spread:>36} {max(every):6.1f} ms {5 * len(every):7}")


if __name__ == "__main__":
    main()
