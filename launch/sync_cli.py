"""`rookery sync`: upload to MLflow what a run's own upload couldn't."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError
from pipeline.tracking.mirror_state import PushReport
from pipeline.tracking.mlflow_mirror import Mirror
from pipeline.tracking.runs import find_runs
from pipeline.wording import counted


def sync(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or folders of them", metavar="RUN...")],
    uri: Annotated[
        str | None,
        typer.Option(help="MLflow address; default: MLFLOW_TRACKING_URI, else the one used in training"),
    ] = None,
) -> None:
    """Upload runs to MLflow. Calling it again uploads only what is new.

    A run that can't be uploaded does not keep the others from it.

    Exit status: 0 all uploaded, 2 a run or the server was at fault.
    """
    faults: list[str] = []
    for run in find_runs(runs):
        try:
            report = Mirror(run, uri).end_if_over()
        except UserError as error:
            if str(error) in faults:  # of the server, then, which the next run would wait for as well
                break
            faults.append(str(error))
            continue
        for notice in report.notices:
            typer.echo(f"{run}: {notice}", err=True)
        typer.echo(f"{run}: {_counts(report)} -> {report.uri} (experiment {report.experiment}, run {report.run_id})")
    if faults:
        raise UserError("\n  ".join(faults))


def _counts(report: PushReport) -> str:
    if not (report.lines or report.params or report.artifacts or report.values or report.versions):
        return "nothing new"
    values = f"{counted(report.values, 'value')} of {counted(report.lines, 'line')}"
    version = ", 1 model version" if report.versions else ""
    return f"{values}, {counted(report.params, 'parameter')}, {counted(report.artifacts, 'file')}{version}"
