"""What identifies a run, and whether a directory holds this very one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.resolve import Resolved
from pipeline.tracking.files import read_json
from pipeline.tracking.redact import redact
from pipeline.tracking.run_dir import RunDir, has_begun
from pipeline.trees import flatten
from pipeline.wording import counted

# Keys that may differ between the starts of one run: they decide where and how fast, not what is computed.
FREE_KEYS = (
    "name",
    "out",
    "resume",
    "data.train",
    "data.val",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "data.resident",
    "data.max_bad_samples",
    "data.trace",
    "train.accumulate",
    "train.stop_after",
    "train.log_every",
    "train.max_bad_steps",
    "train.hang_minutes",
    "train.max_rollbacks",
    "eval.every",
    "eval.batch_size",
    "explain.",
    "profile.",
    "checkpoint.",
    "engine.",
    "tracking.",
)

# But these decide when a loss counts as a spike, and where to go back to; and when moments are rounded.
SPIKE_KEYS = ("train.log_every", "checkpoint.every")
COMPACT_KEYS = ("checkpoint.every", "checkpoint.compact")


def facts(run: Resolved) -> dict[str, Any]:
    """What identifies the data and size of a run, for facts.json."""
    splits = {"train": (run.config.data.train, run.train), "val": (run.config.data.val, run.val)}
    datasets = {
        split: {
            "path": path,
            "fingerprint": manifest.fingerprint(),
            "samples": manifest.num_samples,
            "classes": manifest.num_classes,
        }
        for split, (path, manifest) in splits.items()
        if manifest is not None
    }
    return {
        "datasets": datasets,
        "model_params": run.params,
        "model_macs": run.macs,
        "peak_lr": run.peak_lr,
        "steps_per_epoch": run.plan.steps_per_epoch,
        "total_steps": run.plan.total_steps,
        "total_epochs": run.plan.epoch(run.plan.total_steps),
        "tags": {"paper": run.task.paper(), "recipe": run.config.tracking.recipe},
    }


def check_same_run(path: Path, run: Resolved) -> None:
    """Make sure that a run directory is new, or holds this very run. One that never took a step binds nobody.

    Raises:
        UserError: it holds a run with another config or other data, or `resume=never` and it holds any.
    """
    saved = RunDir.saved_config(path)
    if saved is None or not has_begun(path):
        return
    if run.config.resume == "never":
        raise UserError(f"{path} holds a run already and resume=never; choose another name=... or remove it")
    before, now = flatten(_with_defaults(saved)), flatten(redact(run.config.model_dump(mode="json")))
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    bound: tuple[str, ...] = () if run.config.train.spike_factor is None else SPIKE_KEYS
    if run.config.checkpoint.compact or before.get("checkpoint.compact"):
        bound += COMPACT_KEYS
    differing = [key for key in differing if key in bound or not key.startswith(FREE_KEYS)]
    if differing:
        changes = "; ".join(
            f"{key}: {_as_yaml(before.get(key))} there, {_as_yaml(now.get(key))} here" for key in differing[:5]
        )
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"{path} holds a run with another config ({changes}{more}); "
            "choose another name=..., or use the saved config to go on with that run"
        )
    _check_same_data(path, run)


def _as_yaml(value: Any) -> str:
    """As it can be written into a recipe."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the defaults of keys that came after it, which are chosen so that they change nothing."""
    try:
        return redact(RunConfig.model_validate(saved).model_dump(mode="json"))
    except ValidationError:
        return saved


def _check_same_data(path: Path, run: Resolved) -> None:
    saved = (read_json(path / "facts.json") or {}).get("datasets", {})
    for split, now in facts(run)["datasets"].items():
        before = saved.get(split)
        if before is not None and before["fingerprint"] != now["fingerprint"]:
            raise UserError(
                f"{path} was trained on other shards than data.{split}={now['path']} holds now "
                f"({counted(before['samples'], 'sample')}, fingerprint {before['fingerprint'][:12]} there; "
                f"{counted(now['samples'], 'sample')}, "
                f"{now['fingerprint'][:12]} here); choose another name=..., or point data.{split} at the old shards"
            )
