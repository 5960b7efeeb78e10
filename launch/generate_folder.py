"""The folder of `rookery generate`: pictures of one seed of one generator, so that a FID over it means something."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.tracking.files import read_json, write_json

if TYPE_CHECKING:
    from torch import nn

RECORD_NAME = "generated.json"
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_ELSE = "name an empty folder, or remove them first"


@dataclass(frozen=True)
class Origin:
    """Where the pictures of a folder come from, as `generated.json` says it.

    Attributes:
        weights: directory of the generator's.
        sha256: of the weights themselves: a run that trains on has others in the same place.
        seed: of the latents.
    """

    weights: str
    sha256: str
    seed: int


def check_folder(out: Path, writes: Callable[[str], bool]) -> None:
    """Refuse a place for pictures, before anything is loaded.

    Args:
        writes: whether the command writes a picture of this name.

    Raises:
        UserError: it is no folder, or holds pictures that would stay among the new ones.
    """
    others = sorted(name for name in _pictures(out) if not writes(name))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{out}: it has {others[0]}{more}, which this command doesn't write and a FID over the folder would "
            f"count; {_ELSE}"
        )


def claim_folder(out: Path, origin: Origin) -> None:
    """Make the folder and write down whose pictures it gets, first of all, so that a killed command can be repeated.

    Raises:
        UserError: it has pictures of another seed or generator, or ones of which nothing is known.
        OSError: it can't be written.
    """
    if _pictures(out):
        found = _recorded(out)
        if found is None:
            raise UserError(f"{out}: it has pictures, and no {RECORD_NAME} says what made them; {_ELSE}")
        if (found.sha256, found.seed) != (origin.sha256, origin.seed):
            raise UserError(
                f"{out}: it has pictures of seed {found.seed} from {found.weights}"
                f"{', whose weights were others then' if _only_weights_differ(found, origin) else ''}, not of seed "
                f"{origin.seed} from {origin.weights}; {_ELSE}"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD_NAME, asdict(origin))


def weights_sha256(model: nn.Module) -> str:
    """Of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _only_weights_differ(found: Origin, origin: Origin) -> bool:
    return (found.weights, found.seed) == (origin.weights, origin.seed)


def _pictures(out: Path) -> set[str]:
    try:
        if not out.exists():
            return set()
        if not out.is_dir():
            raise UserError(f"{out}: not a folder; choose another place for the images")
        return {path.name for path in out.iterdir() if path.suffix.lower() in _PICTURES}
    except OSError as error:  # a name that is too long, or one that may not be looked at
        raise UserError(f"{out}: can't be used ({error.strerror}); choose another folder") from error


def _recorded(out: Path) -> Origin | None:
    try:
        return Origin(**read_json(out / RECORD_NAME))
    except (OSError, ValueError, TypeError, UserError):
        return None
