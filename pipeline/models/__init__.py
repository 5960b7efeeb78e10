"""The architectures.

`create_model("nest_tiny", num_classes=10)` builds one, `list_models()` names all; timm knows them as `rookery_<name>`.
"""

from pipeline.models import nest, refiner, hvt, deit  # isort: skip  # registration, in the order of `list_models`
from pipeline.models import nest_official, vit_official
from pipeline.models.base import ImageModel
from pipeline.models.dense import DenseOutput, DenseRequest
from pipeline.models.drop_path import num_drop_paths, set_drop_path_noise
from pipeline.models.errors import ModelError
from pipeline.models.official import load_official
from pipeline.models.pos_embed import resize_pos_embed
from pipeline.models.refine_maps import fold_refiners, set_lean
from pipeline.models.registry import ModelInfo, create_model, list_models, model_info
from pipeline.models.timm_registry import register_with_timm

__all__ = [
    "DenseOutput",
    "DenseRequest",
    "ImageModel",
    "ModelError",
    "ModelInfo",
    "create_model",
    "deit",
    "fold_refiners",
    "hvt",
    "list_models",
    "load_official",
    "model_info",
    "nest",
    "nest_official",
    "num_drop_paths",
    "refiner",
    "resize_pos_embed",
    "set_drop_path_noise",
    "set_lean",
    "vit_official",
]

register_with_timm()
