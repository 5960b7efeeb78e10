"""The architectures.

`create_model("nest_tiny", num_classes=10)` builds one, `list_models()` names all; timm knows them as `rookery_<name>`.
"""

from pipeline.models import nest as nest
from pipeline.models import nest_official as nest_official
from pipeline.models.base import ImageModel
from pipeline.models.drop_path import num_drop_paths, set_drop_path_noise
from pipeline.models.errors import ModelError
from pipeline.models.official import load_official
from pipeline.models.pos_embed import resize_pos_embed
from pipeline.models.registry import ModelInfo, create_model, list_models, model_info
from pipeline.models.timm_registry import register_with_timm

__all__ = [
    "ImageModel",
    "ModelError",
    "ModelInfo",
    "create_model",
    "list_models",
    "load_official",
    "model_info",
    "num_drop_paths",
    "resize_pos_embed",
    "set_drop_path_noise",
]

register_with_timm()
