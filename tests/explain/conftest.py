"""What the explanation tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.train.export import whole_directory, write_weights
from tests.export.sources import source


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported reduced models, a folder each: nest, hvt, refiner."""
    folder = tmp_path_factory.mktemp("models")
    for name, registered in (("nest", "nest_tiny"), ("hvt", "hvt_ti_1"), ("refiner", "refiner_vit_s")):
        model = source(registered)
        with whole_directory(folder / name) as part:
            write_weights(part, model.model.state_dict(), model.described)
    return folder


@pytest.fixture(scope="package")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a JPEG of 60x40 pixels and a PNG of 33x50."""
    folder = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    Image.fromarray(numbers.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "a.jpg")
    Image.fromarray(numbers.integers(0, 256, (50, 33, 3), np.uint8)).save(folder / "b.png")
    return folder
