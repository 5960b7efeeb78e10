"""What a step costs while the MLflow server answers, answers late, or is gone: the phases of one training in turn.

    python -m bench.tracking [--pairs 40] [--seconds 5] [--out FILE]

Run it in the repository's root. It shards the digits, starts a server of its own, and trains a small NesT with one
process and one thread, as phases that differ in nothing but the server. Between any two phases in which it is late or
gone it answers: a phase is compared with the two around it, so that a machine whose pace drifts counts for little. The
length of a step is the median of its phase. Prints the median of the ratios with a 95 % interval (bootstrap over
phases), the longest step, the processor time that the upload takes from other programs, and what the training itself
does for each line that is uploaded.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_prep.options import PrepOptions
from data_prep.prepare import prepare_splits
from pipeline.tracking.environment import device_name, key_versions
from pipeline.tracking.metrics import MetricsLog, read_metrics
from tests.tracking.conftest import MlflowServer, SlowProxy, wait_for
from tests.tracking.step_cost import newest_step
from tests.train.commands import command, environment
from tests.train.conftest import write_recipe

# Delay of every call in seconds; None: connections are closed at once.
ANSWERS, PHASES = "answers", {"answers": 0.0, "2 s per call": 2.0, "gone": None}
UPLOAD = "pipeline.tracking.background"
# A phase begins with what the one before it left: calls that wait, lines to catch up with.
SETTLE = 3.0


@dataclass(frozen=True)
class Phase:
    """Steps `first` + 1 to `last` of a training.

    Attributes:
        server: a key of `PHASES`.
        upload: seconds of processor time per second that the upload's process took.
    """

    server: str
    first: int
    last: int
    upload: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="phases of each kind of bad server")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a phase")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rookery-") as name:
        folder = Path(name)
        prepare_splits("digits", folder / "digits", PrepOptions(workers=1))
        server = MlflowServer(folder)
        server.start()
        try:
            rows = table(*measure(folder, server, options.pairs, options.seconds))
            lines = line_seconds(folder)
        finally:
            server.stop()
    report(rows, lines)
    if options.out is not None:
        options.out.write_text(json.dumps({**about(), "servers": rows, "line_seconds": lines}, indent=1) + "\n")


def about() -> dict[str, Any]:
    """What was measured where."""
    command = " ".join(["python -m bench.tracking", *sys.argv[1:]])
    return {"command": command, "device": device_name(), "versions": key_versions()}


def measure(folder: Path, server: MlflowServer, pairs: int, seconds: float) -> tuple[list[Phase], dict[int, float]]:
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
        upload = next(
            child for child in psutil.Process(training.pid).children(recursive=True) if UPLOAD in child.cmdline()
        )
        late = [name for name in PHASES if name != ANSWERS]
        for name in [ANSWERS, *(phase for _ in range(pairs) for other in late for phase in (other, ANSWERS))]:
            proxy.refuses, proxy.delay = PHASES[name] is None, PHASES[name] or 0.0
            time.sleep(SETTLE)
            step, busy, start = newest_step(run / "metrics.jsonl"), sum(upload.cpu_times()[:2]), time.monotonic()
            time.sleep(seconds)
            taken = (sum(upload.cpu_times()[:2]) - busy) / (time.monotonic() - start)
            phases.append(Phase(name, step, newest_step(run / "metrics.jsonl"), taken))
    finally:
        training.send_signal(signal.SIGINT)
        training.wait()
        proxy.close()
    return phases, {line["step"]: line["step_seconds"] for line in read_metrics(run) if line["kind"] == "train"}


def table(phases: list[Phase], lengths: dict[int, float]) -> dict[str, dict[str, Any]]:
    """A row for each kind of server."""
    of = [[lengths[step] for step in range(phase.first + 1, phase.last + 1)] for phase in phases]
    median = [statistics.median(steps) for steps in of]
    rows = {}
    for name in PHASES:
        own = [i for i, phase in enumerate(phases) if phase.server == name]
        row: dict[str, Any] = {
            "phases": len(own),
            "steps": sum(len(of[i]) for i in own),
            "step_seconds": statistics.median(median[i] for i in own),
            "longest_step_seconds": max(max(of[i]) for i in own),
            "upload_cpu_share": statistics.mean(phases[i].upload for i in own),
        }
        if name != ANSWERS:
            ratios = np.array([2 * median[i] / (median[i - 1] + median[i + 1]) for i in own])
            draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
            low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
            row |= {"ratio": float(np.median(ratios)), "ratio_interval": [float(low), float(high)]}
        rows[name] = row
    return rows


def report(rows: dict[str, dict[str, Any]], lines: dict[str, float]) -> None:
    titles = f"{'step':>11} {'ratio to answers (95 %)':>26} {'longest':>10} {'upload':>16} {'phases':>7} {'steps':>7}"
    print(f"{'server':14} {titles}")
    for name, row in rows.items():
        low, high = row.get("ratio_interval", (1, 1))
        ratio = f"{row['ratio']:.4f} ({low:.4f} ... {high:.4f})" if "ratio" in row else "1"
        step, longest = row["step_seconds"] * 1e3, row["longest_step_seconds"] * 1e3
        upload = f"{row['upload_cpu_share']:.2%} of a core"
        print(f"{name:14} {step:8.3f} ms {ratio:>26} {longest:7.1f} ms {upload:>16} {row['phases']:7} {row['steps']:7}")
    median, late, longest = (lines[key] * 1e6 for key in ("median", "quantile_99", "longest"))
    print(f"a line: median {median:.0f} us, 99 % within {late:.0f} us, longest {longest:.0f} us")


def line_seconds(folder: Path, lines: int = 5000) -> dict[str, float]:
    """How long a training is busy with a line of its metrics: all else about the upload is another process."""
    metrics, found = MetricsLog(folder), []
    values = dict.fromkeys(("loss", "lr", "grad_norm", "images_per_second", "step_seconds", "wait_share"), 0.123456789)
    for step in range(lines):
        start = time.perf_counter()
        metrics.log("train", step, samples=48 * step, epoch=step / 30, **values)
        found.append(time.perf_counter() - start)
    metrics.close()
    found.sort()
    return {"median": found[lines // 2], "quantile_99": found[lines * 99 // 100], "longest": found[-1]}


if __name__ == "__main__":
    main()
