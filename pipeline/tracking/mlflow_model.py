"""The best weights of a run as a version of a model in MLflow's registry.

The model is saved as a graph of torch.export (`pt2`): no code is pickled, and loading it needs neither this package nor
trust in a pickle. It takes normalised images, any number of them, and returns logits.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.tracking.files import read_json
from pipeline.tracking.run_dir import CHECKPOINTS_NAME

SHA_TAG = "rookery.sha256"


def best_weights(run: Path) -> tuple[Path, str] | None:
    """Directory and sha256 of the weights to register: the best, without evaluations the final ones; None: none yet."""
    references = read_json(run / CHECKPOINTS_NAME) or {}
    name = next((name for name in ("best", "final") if name in references), None)
    return None if name is None else (run / name, references[name]["sha256"])


def register(client: Any, run_id: str, name: str, directory: Path, sha256: str) -> str:
    """Make a version of these weights, unless the run has made it before; returns its number.

    Args:
        run_id: the MLflow run that gets the model's files.
        name: of the registered model, which is made where there is none.
        directory: `model.safetensors` and `config.json`.
        sha256: of the weights.

    Raises:
        UserError: the weights can't be read.
    """
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if known.tags.get(SHA_TAG) == sha256:
            return str(known.version)
    # Weights that a resumed run improved on keep their files.
    place = f"model-{sha256[:12]}"
    with tempfile.TemporaryDirectory(prefix="rookery-") as folder:
        described = _save(directory, Path(folder, "model"))
        client.log_artifacts(run_id, str(Path(folder, "model")), place)
    _make_model(client, name)
    figures = {key: str(value) for key, value in described["figures"].items()}
    tags = {SHA_TAG: sha256, "model": described["model"], **figures}
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    return str(client.create_model_version(name, source, run_id, tags=tags).version)


def _save(directory: Path, target: Path) -> dict[str, Any]:
    """Write the MLflow model; returns the content of `config.json`, which goes along."""
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pipeline.models import create_model

    try:
        described: dict[str, Any] = json.loads((directory / "config.json").read_text())
        model = create_model(described["model"], **described["overrides"])
        model.load_state_dict(load_file(directory / "model.safetensors"))
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{directory}: can't read the weights: {error}") from error
    shape = (model.in_chans, model.img_size, model.img_size)
    mlflow.pytorch.save_model(
        model.eval(),
        str(target),
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype(np.float32), (-1, *shape), "images")]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, model.num_classes), "logits")]),
        ),
        # An axis of length 1 would be taken for a constant.
        input_example=np.zeros((2, *shape), np.float32),
        # Told, they needn't be found out by loading the model in another process.
        pip_requirements=[f"mlflow=={version('mlflow')}", f"torch=={torch.__version__.partition('+')[0]}"],
        extra_files=[str(directory / "config.json")],
        serialization_format="pt2",
    )
    return described


def _make_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
