"""The whole training and evaluation transforms: pure, composed in the right order, equal to timm and torchvision."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv

from pipeline.data.augment.keyed import sample_key
from pipeline.data.augment.settings import AugmentConfig, EvalTransformConfig
from pipeline.data.augment.transforms import TrainTransform, build_eval_transform, build_train_transform
from pipeline.errors import UserError
from tests.data.test_augment_settings import RECIPES


def recipe(name: str, **changes: Any) -> AugmentConfig:
    return AugmentConfig.model_validate(RECIPES[name]["augment"] | changes)


@cache
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0])


@cache
def digit() -> Image.Image:
    from sklearn.datasets import load_digits

    return Image.fromarray((load_digits().images[3] * 255 / 16).astype(np.uint8))


def picture_for(name: str) -> Image.Image:
    return {"digits": digit(), "nest-cifar": photo().crop((200, 150, 232, 182))}.get(name, photo())


class Samples(Dataset):
    """Sample i of epoch 1, the way a loader asks for it; a global generator is disturbed on the way."""

    def __init__(self, transform: TrainTransform, image: Image.Image) -> None:
        self.transform, self.image = transform, image

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor]:
        random.seed(i)
        torch.manual_seed(i * 7)
        return i, self.transform(self.image, 11, 1, i)


@pytest.mark.parametrize("name", RECIPES)
def test_pure_whatever_the_worker_and_order(name: str) -> None:
    """Two worker processes and a reversed order change no bit; sample, epoch and seed do."""
    transform = build_train_transform(recipe(name), RECIPES[name]["img_size"])
    image = picture_for(name)
    before = np.asarray(image).copy()
    expected = [transform(image, 11, 1, i) for i in range(6)]
    loader = DataLoader(Samples(transform, image), sampler=range(5, -1, -1), batch_size=None, num_workers=2)
    for i, pixels in loader:
        assert torch.equal(pixels, expected[i])
    others = [transform(image, 11, 1, 1), transform(image, 11, 0, 0), transform(image, 12, 1, 0)]
    assert all(not torch.equal(expected[0], other) for other in others)
    np.testing.assert_array_equal(np.asarray(image), before)


def test_global_generators_are_left_alone() -> None:
    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    transform = build_train_transform(recipe("hvt-deit", interpolation="random"), 64)
    for i in range(20):
        transform(photo(), 0, 0, i)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_shape_type_and_channels(name: str, in_chans: int) -> None:
    size = RECIPES[name]["img_size"]
    config = recipe(name, normalize="half")
    for mode in ("RGB", "L", "CMYK", "P", "RGBA"):
        pixels = build_train_transform(config, size, in_chans)(picture_for(name).convert(mode), 0, 0, 3)
        assert pixels.shape == (in_chans, size, size) and pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert torch.isfinite(pixels).all()


def test_without_augmentation_it_is_to_tensor_and_normalize() -> None:
    config = AugmentConfig.model_validate({"crop": "none", "hflip": 0, "normalize": "cifar100"})
    image = photo().crop((0, 0, 32, 32))
    expected = tv.Compose([tv.ToTensor(), tv.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))])(image)
    assert torch.equal(build_train_transform(config, 32)(image, 0, 0, 0), expected)


def test_flip_frequency_and_content() -> None:
    config = AugmentConfig.model_validate({"crop": "none", "hflip": 0.3, "normalize": "half"})
    transform, image = build_train_transform(config, 32), photo().crop((0, 0, 32, 32))
    plain = build_train_transform(config.model_copy(update={"hflip": 0.0}), 32)(image, 0, 0, 0)
    n, flipped = 1500, 0
    for i in range(n):
        pixels = transform(image, 0, 0, i)
        is_flipped = torch.equal(pixels, plain.flip(-1))
        assert is_flipped or torch.equal(pixels, plain)
        flipped += is_flipped
    assert abs(flipped / n - 0.3) < 4 * np.sqrt(0.21 / n)


@pytest.mark.parametrize("name", ["nest-imagenet", "hvt-deit"])
def test_each_operation_leaves_the_draws_of_the_others(name: str) -> None:
    """Without erasing the rest of the picture is the same to the bit; without RandAugment the crop is."""
    full, size = recipe(name, random_erasing={"prob": 1.0}), RECIPES[name]["img_size"]
    transform = build_train_transform(full, size)
    bare = build_train_transform(full.model_copy(update={"random_erasing": None}), size)
    noise = []
    for i in range(8):
        key = sample_key(5, 0, i)
        box = transform.draw(key).erased
        assert box is not None
        erased, kept = transform(photo(), 5, 0, i), bare(photo(), 5, 0, i)
        area = (slice(None), slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
        noise.append(erased[area].flatten())
        outside = torch.ones_like(erased, dtype=torch.bool)
        outside[area] = False
        assert torch.equal(erased[outside], kept[outside])
        plain = build_train_transform(full.model_copy(update={"rand_augment": None, "color_jitter": None}), size)
        assert transform.crop(photo(), key).tobytes() == plain.crop(photo(), key).tobytes()
    values = torch.cat(noise).double()
    # N(0, 1) after normalisation, not before it.
    assert abs(values.mean()) < 4 / np.sqrt(len(values)) and values.std() == pytest.approx(1, abs=0.02)


def test_const_erasing_gives_the_mean_colour() -> None:
    transform = build_train_transform(recipe("hvt-deit", random_erasing={"prob": 1.0, "mode": "const"}), 224)
    box = transform.draw(sample_key(0, 0, 1)).erased
    assert box is not None
    pixels = transform(photo(), 0, 0, 1)
    assert not pixels[:, box.top : box.top + box.height, box.left : box.left + box.width].any()


def test_order_of_the_steps() -> None:
    """The result is what the drawn steps give one after the other, in the order of the recipes."""
    transform = build_train_transform(recipe("hvt-deit"), 96)
    mean, std = transform.mean, transform.std
    seen = 0
    for i in range(30):
        key = sample_key(0, 0, i)
        image, drawn = transform.crop(photo(), key), transform.draw(key)
        if drawn.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for op in drawn.ops:
            image = op.apply(image, (124, 116, 104))
        expected = (tv.functional.to_tensor(image) - mean) / std
        if drawn.erased is None:
            assert torch.equal(transform(photo(), 0, 0, i), expected)
            seen += len(drawn.ops) == 2
    assert seen >= 3


def test_random_interpolation_is_drawn_for_every_sample() -> None:
    either = [build_train_transform(recipe("refiner", interpolation=name), 64) for name in ("bilinear", "bicubic")]
    transform = build_train_transform(recipe("refiner"), 64)
    taken = []
    for i in range(40):
        key = sample_key(0, 0, i)
        matches = [transform.crop(photo(), key).tobytes() == t.crop(photo(), key).tobytes() for t in either]
        assert sum(matches) == 1
        taken.append(matches[0])
    assert 8 < sum(taken) < 32


def test_digits_are_never_mirrored_and_stay_on_black() -> None:
    transform = build_train_transform(recipe("digits"), 16, 1)
    upright = build_train_transform(recipe("digits", affine=None), 16, 1)(digit(), 0, 0, 0)
    likeness = []
    for i in range(60):
        pixels = transform(digit(), 0, 0, i)
        assert pixels.min() >= -1 and pixels.max() <= 1
        both = [torch.corrcoef(torch.stack([pixels.flatten(), p.flatten()]))[0, 1] for p in (upright, upright.flip(-1))]
        likeness.append(both)
    mine, mirrored = np.array(likeness).mean(0)
    assert mine > mirrored + 0.1 and transform.draw(0).flip is False


# evaluation


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (224, 0.9), (384, 1.0), (448, 1.13), (32, 0.875)])
def test_evaluation_is_torchvisions_and_timms(size: int, crop_pct: float) -> None:
    config = EvalTransformConfig(crop_pct=crop_pct)
    ours = build_eval_transform(config, AugmentConfig(), size)(photo())
    normalize = tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    resize = tv.Resize(int(size / crop_pct), tv.InterpolationMode.BICUBIC)
    theirs = tv.Compose([resize, tv.CenterCrop(size), tv.ToTensor(), normalize])(photo())
    assert torch.equal(ours, theirs)
    if crop_pct <= 1:
        timms: Any = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=crop_pct)
        torch.testing.assert_close(ours, timms(photo()), atol=1e-6, rtol=0)
    else:
        black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(ours[:, 0, 0], black)  # a black frame above and below


@pytest.mark.parametrize("crop", [(0, 0, 640, 427), (0, 0, 427, 427), (3, 1, 300, 401), (0, 0, 100, 90)])
def test_nest_evaluation(crop: tuple[int, int, int, int]) -> None:
    """preprocess.py: shorter side to int(256 / 224 size), sides rounded, bilinear at pixel centres, floor centre."""
    image, size = photo().crop(crop), 224
    config = EvalTransformConfig(interpolation="bilinear", antialias=False)
    ours = build_eval_transform(config, AugmentConfig(normalize="half"), size)(image)

    source = np.asarray(image).astype(np.float64) / 255
    height, width = (round(length * 256 / min(image.size)) for length in source.shape[:2])

    def taps(new: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, None)[(new - size) // 2 :][:size]
        low = place.astype(int)
        return low, np.minimum(low + 1, old - 1), place - low

    y0, y1, fy = taps(height, source.shape[0])
    x0, x1, fx = taps(width, source.shape[1])
    top = source[y0][:, x0] * (1 - fx)[:, None] + source[y0][:, x1] * fx[:, None]
    bottom = source[y1][:, x0] * (1 - fx)[:, None] + source[y1][:, x1] * fx[:, None]
    expected = (top * (1 - fy)[:, None, None] + bottom * fy[:, None, None] - 0.5) / 0.5
    torch.testing.assert_close(ours, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("antialias", [True, False])
def test_evaluation_of_small_pictures(antialias: bool) -> None:
    resized = EvalTransformConfig(resize="resize_only", interpolation="bilinear", antialias=antialias)
    exact = EvalTransformConfig(resize="none", interpolation="bilinear", antialias=antialias)
    augment = AugmentConfig(normalize="half")
    pixels = build_eval_transform(resized, augment, 16, 1)(digit())
    enlarged = torch.nn.functional.interpolate(
        tv.functional.to_tensor(digit())[None], size=(16, 16), mode="bilinear", align_corners=False
    )[0]
    torch.testing.assert_close(pixels, (enlarged - 0.5) / 0.5, atol=0.005, rtol=0)  # PIL rounds to 8 bits
    same = build_eval_transform(exact, augment, 8, 3)(digit())
    assert torch.equal(same, ((tv.functional.to_tensor(digit()) - 0.5) / 0.5).expand(3, -1, -1))
    with pytest.raises(UserError, match="8x8 picture can't give a 16x16 input"):
        build_eval_transform(exact, augment, 16)(digit())


# real pictures


def real_images(folder: Path, name: str) -> Iterator[Image.Image]:
    if name == "nest-cifar":
        import pyarrow.parquet as pq

        batch = next(pq.ParquetFile(folder / "cifar10" / "test.parquet").iter_batches(batch_size=40, columns=["img"]))
        yield from (Image.open(io.BytesIO(row["img"]["bytes"])) for row in batch.to_pylist())
    else:
        yield from (Image.open(path) for path in sorted((folder / "imagenet-sample").glob("*/*.JPEG"))[:16])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "digits"])
def test_real_pictures(name: str, real_data: Path) -> None:
    """The inputs that a model meets: right shape, finite, centred about as normalised data should be."""
    size = RECIPES[name]["img_size"]
    train = build_train_transform(recipe(name), size)
    evaluate = build_eval_transform(EvalTransformConfig(**RECIPES[name]["eval_transform"]), recipe(name), size)
    inputs = [[train(image, 0, 0, i), evaluate(image)] for i, image in enumerate(real_images(real_data, name))]
    trained, evaluated = (torch.stack(column) for column in zip(*inputs, strict=True))
    assert trained.shape == evaluated.shape == (len(inputs), 3, size, size)
    for pixels in (trained, evaluated):
        assert torch.isfinite(pixels).all()
        assert abs(pixels.mean()) < 0.5 and 0.4 < pixels.std() < 1.6
    assert trained.flatten(1).std(1).min() > 0 and not torch.equal(trained, evaluated)
