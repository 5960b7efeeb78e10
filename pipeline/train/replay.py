"""The samples that a run listed as bad, tried again on the shards as they are now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.data.loader import load_sample
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import BadSample
from pipeline.errors import UserError
from pipeline.tracking.files import read_json
from pipeline.tracking.run_data import data_of_run
from pipeline.tracking.run_dir import FACTS_NAME, RunDir
from pipeline.train.quarantine import read_quarantine


@dataclass(frozen=True)
class Replayed:
    """A sample of the list.

    Attributes:
        shard: its file.
        key: its key; empty where it was never read.
        sample: its position in the manifest.
        reason: what was wrong when the run met it.
        now: what is wrong now; None: nothing.
    """

    shard: str
    key: str
    sample: int
    reason: str
    now: str | None


def replay(run: Path, data: str | Path | None = None) -> tuple[str, list[Replayed]]:
    """Try every sample of a run's list again.

    Args:
        run: the run directory.
        data: path or address of its training shards now; None: where the run found them.

    Returns:
        Where the shards are, as messages call it, and the samples in the order of the list.

    Raises:
        UserError: no run, a damaged list, or shards that can't be those of the run.
    """
    config = RunDir.saved_config(run)
    if config is None:
        raise UserError(f"{run}: no run directory; name one, such as runs/<name>")
    facts = read_json(run / FACTS_NAME) or {}
    directory = data or data_of_run(run, config["data"]["train"])
    listed = read_quarantine(run)
    shards = ShardSet(directory, check_files=False)
    trained_on = facts.get("datasets", {}).get("train", {}).get("fingerprint")
    if trained_on not in (None, shards.manifest.fingerprint()):
        raise UserError(
            f"{directory}: not the shards that {run} was trained on; name their folder after --quarantine RUN"
        )
    channels, tokens = config["model"].get("in_chans", 3), config.get("objective", {}).get("token_labels", False)

    def fault(sample: int) -> str | None:
        try:
            load_sample(shards, sample, channels, tokens)
        except BadSample as error:
            return error.reason
        return None

    again = [
        Replayed(**{k: line[k] for k in ("shard", "key", "sample", "reason")}, now=fault(line["sample"]))
        for line in listed
    ]
    return shards.directory, again
