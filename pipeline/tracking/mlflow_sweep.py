"""A sweep is one MLflow run, and its trials are the children of it.

No trial is the first by design: each looks for the parent and makes it where there is none. Trials that start at once
may make several. MLflow has nothing that only one of them could take, so they settle it: the oldest is the parent,
whoever made another removes it, and each looks again at its end, when what the others made is visible.
"""

from __future__ import annotations

from typing import Any

SWEEP_TAG = "rookery.sweep"
MAKER_TAG = "rookery.sweep_made_by"
PARENT_TAG = "mlflow.parentRunId"


def join_sweep(client: Any, experiment_id: str, sweep: str, uid: str) -> str:
    """The id of the sweep's parent run, which is made where there is none.

    Args:
        sweep: its name; one parent per name and experiment.
        uid: tells the trial that asks from all others; asking again never makes another parent.
    """
    found = _parents(client, experiment_id, sweep)
    if not found:
        tags = {SWEEP_TAG: sweep, MAKER_TAG: uid}
        made = client.create_run(experiment_id, tags=tags, run_name=sweep)
        found = _parents(client, experiment_id, sweep) or [made]
    oldest, *others = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
    for run in others:
        if run.data.tags.get(MAKER_TAG) == uid:
            client.delete_run(run.info.run_id)
    return str(oldest.info.run_id)


def update_sweep(client: Any, experiment_id: str, parent: str) -> None:
    """Let the parent run for as long as a trial does."""
    running = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'"
    status = "RUNNING" if client.search_runs([experiment_id], running, max_results=1) else "FINISHED"
    if client.get_run(parent).info.status != status:
        if status == "RUNNING":
            client.update_run(parent, status)
        else:
            client.set_terminated(parent, status)


def _parents(client: Any, experiment_id: str, sweep: str) -> list[Any]:
    return list(client.search_runs([experiment_id], f"tags.`{SWEEP_TAG}` = '{sweep}'"))
