"""The compiled transform of a batch equals the plain one of each sample, in every recipe."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from pipeline.data.augment.finish import Erased
from pipeline.data.augment.keyed import Numbers, Stream, sample_key
from pipeline.data.augment.settings import AugmentConfig
from pipeline.data.augment.transforms import TrainTransform
from pipeline.data.fast.decode import decode_array, decode_part
from pipeline.data.fast.transform import FastTransform
from tests.data.test_augment_settings import RECIPES

# Name: (recipe, changes, side, channels, largest difference in 1/255, share of values that differ by more than 0.501).
# Colour jitter is rounded to 8 bits: half of 1/255. Resizing may give one less or more in a few pixels, which an
# operation behind it, such as posterising, can make any number.
CASES: dict[str, tuple[str, dict[str, Any], int, int, float, float]] = {
    "nest-imagenet": ("nest-imagenet", {}, 96, 3, 255, 2e-3),
    "nest-imagenet, no jitter": ("nest-imagenet", {"color_jitter": None, "rand_augment": None}, 96, 3, 1.001, 1e-3),
    "nest-cifar": ("nest-cifar", {}, 32, 3, 0, 0),
    "nest-cifar, reflected": ("nest-cifar", {"crop": {"kind": "pad", "padding": 4, "fill": "reflect"}}, 32, 3, 0, 0),
    "jitter alone": ("nest-imagenet", {"rand_augment": None, "crop": "center"}, 96, 3, 0.501, 0),
    "hvt-deit": ("hvt-deit", {"rand_augment": None}, 96, 3, 9.001, 0.06),
    "refiner": ("refiner", {"rand_augment": None}, 96, 3, 9.001, 0.06),
    "bilinear, antialiased": ("refiner", {"rand_augment": None, "interpolation": "bilinear"}, 96, 3, 1.001, 0.06),
    "centre": ("hvt-deit", {"crop": "center"}, 96, 3, 0, 0),
    "digits": ("digits", {"random_erasing": {"prob": 0.5}}, 16, 1, 0, 0),
    "grey nest-cifar": ("nest-cifar", {"normalize": "half"}, 32, 1, 0, 0),
    "crop last": ("hvt-deit", {"crop": {"kind": "pad", "padding": 4}, "crop_last": True}, 32, 3, 0, 0),
    "resized first": ("hvt-deit", {"resize": 120, "crop": "center"}, 96, 3, 0, 0),
}


def config_of(case: str) -> AugmentConfig:
    name, changes, *_ = CASES[case]
    return AugmentConfig.model_validate(RECIPES[name]["augment"] | changes)


def pictures(side: int, in_chans: int, n: int) -> list[np.ndarray]:
    if in_chans == 1 and side == 16:
        return [(digit * 255 / 16).astype(np.uint8)[:, :, None] for digit in load_digits().images[:n]]
    photo = load_sample_images().images[0]
    draw, found = np.random.default_rng(0), []
    for _ in range(n):
        height, width = (side, side) if side == 32 else draw.integers(side, 300, 2)
        top, left = draw.integers(0, photo.shape[0] - height), draw.integers(0, photo.shape[1] - width)
        found.append(np.ascontiguousarray(photo[top : top + height, left : left + width, :in_chans]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_path(case: str) -> None:
    _, _, side, in_chans, largest, share = CASES[case]
    config, n = config_of(case), 48
    plain, fast = TrainTransform(config, side, in_chans), FastTransform(config, side, in_chans)
    decoded, indices = pictures(side, in_chans, n), np.arange(n) * 7
    done = fast(decoded, 3, 2, indices, trace=True)
    images = fast.finish.on_host(done.pixels, done.erased)
    assert done.warps is not None and len(done.erased.boxes) > n / 10
    differences = []
    for i, picture in enumerate(decoded):
        image = Image.fromarray(picture if in_chans == 3 else picture[:, :, 0])
        expected, warps = plain.traced(image, 3, 2, int(indices[i]))
        assert np.array_equal(done.warps[i], warps)
        differences.append((images[i] - expected).abs() * fast.finish.std * 255)
    difference = torch.stack(differences)
    assert difference.max() <= largest + 1e-4 and (difference > 0.501).float().mean() <= share


@pytest.mark.parametrize("case", ["nest-imagenet", "hvt-deit", "digits"])
def test_finished_on_the_device_is_finished_on_the_host(case: str) -> None:
    _, _, side, in_chans, *_ = CASES[case]
    fast = FastTransform(config_of(case), side, in_chans)
    done = fast(pictures(side, in_chans, 16), 0, 0, np.arange(16))
    pixels = torch.from_numpy(done.pixels).permute(0, 3, 1, 2)
    erased = Erased(torch.from_numpy(done.erased.boxes), torch.from_numpy(done.erased.noise))
    images = fast.finish(pixels, erased)
    assert images.is_contiguous() and torch.equal(images, fast.finish.on_host(done.pixels, done.erased))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["nest-imagenet", "hvt-deit"])
def test_finished_on_a_gpu(case: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _, _, side, in_chans, *_ = CASES[case]
    fast = FastTransform(config_of(case), side, in_chans)
    done = fast(pictures(side, in_chans, 16), 0, 0, np.arange(16))
    expected = fast.finish.on_host(done.pixels, done.erased)
    noise = torch.from_numpy(done.erased.noise).cuda()
    images = fast.finish(torch.from_numpy(done.pixels).permute(0, 3, 1, 2).cuda(), Erased(done.erased.boxes, noise))
    assert torch.allclose(images.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    fast = FastTransform(config_of("nest-imagenet"), 96, 3)
    decoded = pictures(96, 3, 12)
    whole = fast(decoded, 5, 1, np.arange(12))
    for i in range(12):
        alone = fast(decoded[i : i + 1], 5, 1, np.array([i]))
        assert np.array_equal(alone.pixels[0], whole.pixels[i])
        [mine] = np.flatnonzero(whole.erased.boxes[:, 0] == i)[None] if len(alone.erased.boxes) else [[]]
        assert np.array_equal(alone.erased.boxes[:, 1:], whole.erased.boxes[mine, 1:])


@pytest.mark.parametrize("case", ["nest-imagenet", "hvt-deit", "centre", "digits"])
def test_the_rest_of_a_picture_is_not_needed(case: str) -> None:
    _, _, side, in_chans, *_ = CASES[case]
    fast, indices = FastTransform(config_of(case), side, in_chans), np.arange(24)
    files = []
    for picture in pictures(side, in_chans, 24):
        buffer = io.BytesIO()
        Image.fromarray(picture if in_chans == 3 else picture[:, :, 0]).save(buffer, "JPEG", restart_marker_blocks=1)
        files.append(buffer.getvalue())
    wholes = [decode_array(data, in_chans) for data in files]
    pairs = zip(files, fast.numbers(1, 0, indices), strict=True)
    parts = [decode_part(data, in_chans, None, partial(fast.wanted, numbers)) for data, numbers in pairs]
    smaller = sum(part.pixels.size < 0.7 * whole.size for part, whole in zip(parts, wholes, strict=True))
    assert smaller > 3 if case in ("nest-imagenet", "hvt-deit") else smaller == 0
    expected, got = fast(wholes, 1, 0, indices, trace=True), fast(parts, 1, 0, indices, trace=True)
    assert np.array_equal(got.pixels, expected.pixels) and np.array_equal(got.warps, expected.warps)


def test_numbers_of_a_batch_are_those_of_each_sample() -> None:
    needed = {Stream.FLIP: 1, Stream.CROP: 41, Stream.RANDOM_ERASING: 3}
    indices = np.array([0, 5, 2**40])
    for index, numbers in zip(indices.tolist(), Numbers.of_batch(7, 3, indices, needed), strict=True):
        alone = Numbers(sample_key(7, 3, index))
        assert numbers.key == alone.key
        for stream, n in needed.items():
            assert numbers.of(stream, n) == alone.of(stream, n)
