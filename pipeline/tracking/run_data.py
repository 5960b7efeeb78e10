"""Where the data of a run lie, seen from the folder that a later command is started in."""

from __future__ import annotations

from pathlib import Path

from data_prep.store import is_remote, local_path
from pipeline.tracking.files import read_json
from pipeline.tracking.run_dir import FACTS_NAME


def data_of_run(run: Path, place: str) -> str:
    """`data.train` or `data.val` of a run as this process finds it: the run may have been started in another folder.

    What is nowhere to be found (text on a hub and made text are none of a folder's) stays as it is.
    """
    if is_remote(place) or local_path(place).exists():
        return place
    facts = read_json(run / FACTS_NAME)
    there = Path(facts.get("folder", ".") if isinstance(facts, dict) else ".", place)
    return str(there) if there.exists() else place
