"""`rookery verify --quarantine`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from data_prep.wording import counted


def replay_quarantine(run: Path, data: str | None, as_json: bool) -> None:
    """Print which samples of a run's list are still bad; exit status 1 if any is."""
    from pipeline.train.replay import replay

    directory, samples = replay(run, data)
    bad = [sample for sample in samples if sample.now is not None]
    if as_json:
        content = {"ok": not bad, "run": str(run), "data": str(directory), "samples": [*map(asdict, samples)]}
        typer.echo(json.dumps(content, indent=1))
    else:
        for sample in samples:
            name = sample.key or f"sample {sample.sample}"
            state = f"still bad: {sample.now}" if sample.now else f"fine now (it was: {sample.reason})"
            typer.echo(f"{directory}/{sample.shard}: {name}: {state}")
        if bad:
            typer.echo("    run the same `rookery prep` command again with --repair: it makes only what is damaged")
        listed = f"{counted(len(samples), 'bad sample')} listed, {len(bad):,} still bad"
        typer.echo(f"{run}: {listed if samples else 'no bad sample listed'}")
    if bad:
        raise typer.Exit(1)
