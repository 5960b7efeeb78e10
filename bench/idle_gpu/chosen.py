"""What the scripts that count on the idle GPU are told: models, and a file for the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch


def chosen(script: str, groups: Sequence[Sequence[str]]) -> tuple[set[str], Path | None]:
    """Models of the command line, none for all, and the file to write, if any; ends with a message at mistakes.

    Args:
        script: name of a script in `bench`.
        groups: names of the models that it counts.
    """
    parser = argparse.ArgumentParser(description=f"Count on the idle GPU; see bench/{script}.py.")
    parser.add_argument(
        "--out", type=Path, help=f"file to write; default: bench/results/{script}.json, none with --only"
    )
    parser.add_argument("--only", type=lambda names: names.split(","), help="models whose groups to count: a,b,c")
    options = parser.parse_args()
    results = Path(__file__).parents[1] / "results"
    out: Path | None = options.out or (None if options.only else results / f"{script}.json")
    if not torch.cuda.is_available() or "computes nothing" not in torch.cuda.get_device_name():
        parser.error(f"it counts on the idle GPU: bench/idle_gpu.sh python bench/{script}.py")
    wanted = set(options.only or ())
    known = {name for group in groups for name in group}
    if unknown := sorted(wanted - known):
        parser.error(f"--only {unknown[0]}: there is {', '.join(sorted(known))}")
    if out is not None and not out.parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.parent}")
    return wanted, out
