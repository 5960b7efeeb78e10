"""Uploads a run directory to MLflow, now or later, each value once.

`metrics.jsonl` and the other files of the run directory are the truth; `mlflow.json` says what of them was uploaded
where. Importing mlflow takes seconds and its calls hold the interpreter lock, so training never uses this module
directly: `pipeline.tracking.background` runs it in a process of its own. Only the `mlflow_` modules import mlflow.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.tracking.files import file_sha256
from pipeline.tracking.metrics import METRICS_NAME
from pipeline.tracking.mirror_content import (
    MAX_PARAM,
    MAX_TAG,
    clean_key,
    run_files,
    run_pages,
    run_params,
    run_tags,
    run_times,
    shorten,
    summary_points,
)
from pipeline.tracking.mirror_state import MirrorState, PushReport, resolve_uri, sqlite_path
from pipeline.tracking.mlflow_client import connect, find_experiment, locked, reason, unreachable
from pipeline.tracking.mlflow_model import best_weights, register
from pipeline.tracking.mlflow_sweep import PARENT_TAG, join_sweep, update_sweep
from pipeline.tracking.redact import redact, without_password
from pipeline.tracking.run_report import draw, sources
from pipeline.tracking.runs import run_state
from pipeline.tracking.tail import Point, read_batches

MAX_METRICS = 1000
MAX_PARAMS = 100
LOCK_NAME = ".mlflow.lock"
UID_TAG = "rookery.uid"
# MLflow knows no more words than these; the tag `state` has ours.
_STATUS = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "killed": "KILLED",
}


class Mirror:
    """One run directory and its run on an MLflow server (or in an SQLite file).

    Args:
        run_dir: the run directory, being written or not.
        tracking_uri: MLflow address; None: MLFLOW_TRACKING_URI, else the one used before, else `sqlite:///mlflow.db` in
            the working directory, which `mlflow ui` shows there.
        experiment: None: the one used before, else the config's `tracking.experiment`, else "rookery".
        run_name: None: the directory's name.
        tags: added to those of `mirror_content.run_tags`.
        params: None: the saved config, flat.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        params: dict[str, Any] | None = None,
    ) -> None:
        self.run = Path(run_dir)
        self.uri = resolve_uri(self.run, tracking_uri)
        self._experiment = experiment
        self._run_name = run_name
        self._tags = tags or {}
        self._params = params
        self._client: Any = None
        self._experiment_id = ""
        self._parent: str | None = None
        self._ready = False

    def push(self, status: str | None = None) -> PushReport:
        """Upload what is new. A failure in the middle loses and repeats nothing at the next push.

        Args:
            status: "finished", "stopped", "failed", "interrupted" or "killed" when the run has ended: also sends the
                closing figures and pictures and ends the MLflow run; a finished run's weights become a model version.

        Raises:
            UserError: mlflow is missing, the server can't be reached or refuses; the message says which.
        """
        report = PushReport(without_password(self.uri))
        try:
            with locked(self.run / LOCK_NAME):
                state = MirrorState.load(self.run, self.uri)
                self._push(state, report, status)
        except UserError:
            self._ready = False
            raise
        except ModuleNotFoundError as error:
            raise UserError(f"MLflow can't be used ({error}); install it: pip install mlflow") from error
        except Exception as error:
            self._ready = False
            raise UserError(f"MLflow at {report.uri} {reason(error)}") from error
        return report

    def end_if_over(self) -> PushReport:
        """Push, and when no process writes the run any more, end the MLflow run with what became of it."""
        state = run_state(self.run)
        return self.push(state if state in _STATUS else None)

    def _push(self, state: MirrorState, report: PushReport, status: str | None) -> None:
        if not self._ready:
            self._begin(state, report)
            self._ready = True
        report.experiment, report.run_id = state.experiment, str(state.run_id)
        self._send_metrics(state, report)
        if status is not None:
            self._send_summary(state, report)
            self._send_tags(state, status)
            self._client.set_terminated(state.run_id, _STATUS[status], end_time=run_times(self.run)[1])
            self._update_sweep()
        stored = self._store(report, f"the run's files stay in {self.run} only", self._send_files, state)
        if status is not None and stored:
            self._store(report, "no pictures", self._send_pictures, state)
        if status == "finished":
            self._store(report, "no model version", self._send_model, state)

    def _begin(self, state: MirrorState, report: PushReport) -> None:
        """Find or create the MLflow run, and make its parameters, tags and status those of the run directory."""
        params = self._params if self._params is not None else run_params(self.run)
        original = state.copied_from(self.run, self.uri)
        if original is not None:
            report.notices.append(f"{self.run} is a copy of {original}, and gets an MLflow run of its own")
            state.run_name = ""
            state.forget_run()
        state.folder = str(self.run.resolve())
        state.experiment = self._experiment or state.experiment or params.get("tracking.experiment") or "rookery"
        state.run_name = self._run_name or state.run_name or self.run.resolve().name
        state.save(self.run, self.uri, reached=False)
        self._experiment_id = self._connect(state.experiment)
        found = self._find(state)
        if found is None and state.run_id is not None:
            report.notices.append(f"MLflow at {report.uri} no longer has run {state.run_id}; all goes to a new one")
            state.forget_run()
        if found is None:
            state.uid = state.uid or uuid.uuid4().hex
            state.save(self.run, self.uri)
            found = self._client.create_run(
                self._experiment_id, run_times(self.run)[0], tags={UID_TAG: state.uid}, run_name=state.run_name
            )
        state.run_id = found.info.run_id
        state.save(self.run, self.uri)
        self._send_params(state, params, found.data.params, report)
        self._send_tags(state, run_state(self.run))
        if found.info.status != "RUNNING" and run_state(self.run) == "running":
            self._client.update_run(state.run_id, status="RUNNING")
        self._update_sweep()

    def _connect(self, experiment: str) -> str:
        """Open the client; returns the experiment's id."""
        database = sqlite_path(self.uri)
        # Two runs that start together would both create the tables of a new SQLite file.
        with locked(database.with_name(f"{database.name}.lock")) if database else nullcontext():
            self._client = connect(self.uri)
            return find_experiment(self._client, self.uri, experiment)

    def _find(self, state: MirrorState) -> Any:
        """The MLflow run of an earlier push, None where there is none (any more)."""
        from mlflow.exceptions import MlflowException

        if state.run_id is None:
            if state.uid is None:
                return None
            ours = f"tags.`{UID_TAG}` = '{state.uid}'"
            return next(iter(self._client.search_runs([self._experiment_id], ours)), None)
        try:
            found = self._client.get_run(state.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return found if found.info.lifecycle_stage == "active" else None

    def _send_params(
        self, state: MirrorState, params: dict[str, Any], there: dict[str, str], report: PushReport
    ) -> None:
        from mlflow.entities import Param, RunTag

        wanted = {clean_key(key): shorten(redact(str(value)), MAX_PARAM) for key, value in params.items()}
        cut = [key for key, value in params.items() if len(str(value)) > MAX_PARAM]
        if cut:
            report.notices.append(f"MLflow holds {MAX_PARAM} characters of {', '.join(cut)}; config.yaml has all")
        new = [Param(key, value) for key, value in wanted.items() if key not in there]
        for start in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(state.run_id, params=new[start : start + MAX_PARAMS])
        report.params += len(new)
        # MLflow's parameters can't be changed, a run's config can (longer training, another batch split).
        changed = {key: value for key, value in wanted.items() if there.get(key, value) != value}
        if changed:
            self._client.log_batch(state.run_id, tags=[RunTag("config_changed", shorten(json.dumps(changed), MAX_TAG))])

    def _send_tags(self, state: MirrorState, became: str) -> None:
        from mlflow.entities import RunTag

        own = {clean_key(k): shorten(v, MAX_TAG) for k, v in self._tags.items()}
        tags = run_tags(self.run) | {"state": became} | self._sweep_tags(state) | own
        every = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(every), MAX_PARAMS):
            self._client.log_batch(state.run_id, tags=every[start : start + MAX_PARAMS])

    def _send_metrics(self, state: MirrorState, report: PushReport) -> None:
        for batch in read_batches(self.run / METRICS_NAME, state.tail, MAX_METRICS):
            self._log(state, batch.points)
            report.lines += batch.state.lines - state.tail.lines
            report.values += len(batch.points)
            state.tail = batch.state
            state.save(self.run, self.uri)

    def _send_summary(self, state: MirrorState, report: PushReport) -> None:
        points = summary_points(self.run)
        figures = [[point.key, point.value, point.step] for point in points]
        if figures != state.summary:
            self._log(state, points)
            report.values += len(points)
            state.summary = figures
            state.save(self.run, self.uri)

    def _log(self, state: MirrorState, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(clean_key(p.key), p.value, p.time_ms, p.step) for p in points]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(state.run_id, metrics=metrics[start : start + MAX_METRICS])

    def _sweep_tags(self, state: MirrorState) -> dict[str, str]:
        sweep = self._setting("sweep")
        if sweep is None:
            return {}
        self._parent = join_sweep(self._client, self._experiment_id, sweep, str(state.uid))
        return {"sweep": sweep, PARENT_TAG: self._parent}

    def _update_sweep(self) -> None:
        if self._parent is not None:
            update_sweep(self._client, self._experiment_id, self._parent)

    def _setting(self, key: str) -> Any:
        return run_params(self.run).get(f"tracking.{key}")

    def _store(
        self, report: PushReport, without: str, send: Callable[[MirrorState, PushReport], None], state: MirrorState
    ) -> bool:
        """Send something that goes to another service than the server: metrics must not wait for what it refuses."""
        try:
            send(state, report)
        except Exception as error:
            if unreachable(error):
                raise
            why = str(error) if isinstance(error, UserError) else f"MLflow {reason(error)}"
            report.notices.append(f"{without}: {why}; `rookery sync` tries again")
            return False
        return True

    def _send_files(self, state: MirrorState, report: PushReport) -> None:
        for file in run_files(self.run):
            self._send_file(state, report, file, file_sha256(file))
        for file in run_pages(self.run):
            # A long run has hundreds: no need to read them all at every push.
            if f"{file.parent.name}/{file.name}" not in state.artifacts:
                self._send_file(state, report, file, file_sha256(file), file.parent.name)

    def _send_pictures(self, state: MirrorState, report: PushReport) -> None:
        drawn_from = sources(self.run)
        if drawn_from == state.pictures:
            return
        with tempfile.TemporaryDirectory(prefix="rookery-") as folder:
            for file in draw(self.run, Path(folder)):
                self._send_file(state, report, file, file_sha256(file), "plots")
        state.pictures = drawn_from
        state.save(self.run, self.uri)

    def _send_file(
        self, state: MirrorState, report: PushReport, file: Path, digest: str, place: str | None = None
    ) -> None:
        name = file.name if place is None else f"{place}/{file.name}"
        if state.artifacts.get(name) != digest:
            self._client.log_artifact(state.run_id, str(file), place)
            state.artifacts[name] = digest
            state.save(self.run, self.uri)
            report.artifacts += 1

    def _send_model(self, state: MirrorState, report: PushReport) -> None:
        name, weights = self._setting("register_model"), best_weights(self.run)
        if name is None or weights is None or state.model == [name, weights[1]]:
            return
        register(self._client, str(state.run_id), name, *weights)
        state.model = [name, weights[1]]
        state.save(self.run, self.uri)
        report.versions += 1
