"""What MLflow is told about a run, read from its directory: parameters, tags, files, closing figures."""

from __future__ import annotations

import getpass
import re
from pathlib import Path
from typing import Any

from pipeline.tracking.confusion import BEST_NAME, NEWEST_NAME
from pipeline.tracking.files import read_json, read_lines
from pipeline.tracking.redact import redact
from pipeline.tracking.run_dir import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    DIFF_NAME,
    EXPLAIN_NAME,
    FACTS_NAME,
    QUARANTINE_NAME,
    RESULT_NAME,
    SAMPLES_NAME,
    SESSIONS_NAME,
    RunDir,
)
from pipeline.tracking.tail import Point
from pipeline.trees import flatten

# MLflow's limits (its validation module): longer parameters and tags are refused or cut without a word.
MAX_PARAM = 6000
MAX_TAG = 5000
MAX_KEY = 250
_NOT_IN_KEYS = re.compile(r"[^\w\-. :/]", re.ASCII)
_CUT = " ... (cut)"


def clean_key(name: str) -> str:
    """A name that MLflow accepts for parameters, metrics and tags."""
    return _NOT_IN_KEYS.sub("_", name)[:MAX_KEY]


def shorten(value: Any, limit: int) -> str:
    """`value` as text of at most `limit` characters."""
    text = str(value)
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def run_params(path: Path) -> dict[str, Any]:
    """The resolved config, flat."""
    return flatten(RunDir.saved_config(path) or {})


def run_tags(path: Path) -> dict[str, str]:
    """Tags to search runs by: the caller's (`facts["tags"]`), model, data fingerprints, code, place, restarts."""
    facts = read_json(path / FACTS_NAME) or {}
    config = RunDir.saved_config(path) or {}
    git = facts.get("git") or {}
    starts = [entry for entry in read_lines(path / SESSIONS_NAME) if entry["event"] == "start"]
    tags: dict[str, Any] = {
        "run_dir": path.resolve(),
        "host": facts.get("environment", {}).get("host"),
        "git_commit": git.get("commit"),
        "git_branch": git.get("branch"),
        "git_dirty": git.get("dirty"),
        "model": (config.get("model") or {}).get("name"),
        "starts": len(starts) or None,
        "mlflow.user": getpass.getuser(),
        "mlflow.source.type": "JOB",
        "mlflow.source.name": " ".join(facts.get("command", [])) or None,
        "mlflow.source.git.commit": git.get("commit"),
    }
    for split, data in facts.get("datasets", {}).items():
        tags[f"dataset.{split}.path"] = data.get("path")
        tags[f"dataset.{split}.fingerprint"] = data.get("fingerprint")
    for name, reference in (read_json(path / CHECKPOINTS_NAME) or {}).items():
        tags[f"checkpoint.{name}.path"] = reference.get("path")
        tags[f"checkpoint.{name}.sha256"] = reference.get("sha256")
    tags |= facts.get("tags", {})
    return {clean_key(k): shorten(redact(str(v)), MAX_TAG) for k, v in tags.items() if v is not None}


def run_times(path: Path) -> tuple[int | None, int | None]:
    """First start and last end of the run in milliseconds since 1970, None where not recorded."""
    sessions = read_lines(path / SESSIONS_NAME)
    times = [int(entry["time"] * 1000) for entry in sessions]
    ended = bool(sessions) and sessions[-1]["event"] == "end"
    return (times[0] if times else None), (times[-1] if ended else None)


def run_files(path: Path) -> list[Path]:
    """The small files that go along as artifacts; weights stay where they are, `checkpoints.json` names them."""
    names = (
        CONFIG_NAME,
        FACTS_NAME,
        DIFF_NAME,
        SESSIONS_NAME,
        QUARANTINE_NAME,
        CHECKPOINTS_NAME,
        RESULT_NAME,
        NEWEST_NAME,
        BEST_NAME,
    )
    return [path / name for name in names if (path / name).exists()]


def run_pages(path: Path) -> list[Path]:
    """Pictures made at evaluations, of `explain.images` and of generators; one doesn't change once it is there."""
    return [page for folder in (EXPLAIN_NAME, SAMPLES_NAME) for page in sorted((path / folder).glob("*-*.png"))]


def summary_points(path: Path) -> list[Point]:
    """`result.json` as metrics `final/<name>` and `best/<name>` at the last step; empty before the run is complete."""
    file = path / RESULT_NAME
    result = read_json(file)
    if not result:
        return []
    time_ms, step = int(file.stat().st_mtime * 1000), int(result.get("step", 0))
    figures = {f"final/{k}": v for k, v in result.items()} | {f"best/{k}": v for k, v in result.get("best", {}).items()}
    return [
        Point(clean_key(key), float(value), time_ms, step)
        for key, value in figures.items()
        if isinstance(value, int | float) and key not in ("final/step", "final/samples")
    ]
