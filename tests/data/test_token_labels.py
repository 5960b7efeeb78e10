"""Label maps follow what is done to the picture, and become the targets that a slow reference computes."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import roi_align

import pipeline.data.batches as batches_module
from data_prep.options import PrepOptions
from data_prep.prepare import prepare
from pipeline.data.augment.crop import Box
from pipeline.data.augment.geometry import crop_warp, swapped_axes
from pipeline.data.augment.keyed import sample_key
from pipeline.data.augment.mixing import MixConfig
from pipeline.data.augment.settings import AugmentConfig
from pipeline.data.augment.token_labels import TokenLabelBatch, token_targets
from pipeline.data.augment.transforms import build_train_transform
from pipeline.data.batches import Batches
from pipeline.data.loader import StepDataset, TokenLabelOptions, TrainBatch, load_sample
from pipeline.data.order import DataOrder
from pipeline.data.shards import ShardSet
from pipeline.data.substitute import BadSample
from tests.data_prep.helpers import make_folder
from tests.data_prep.label_maps import label_map, make_maps

CLASSES = 7


def random_maps(n: int, rows: int, columns: int, k: int = 3) -> torch.Tensor:
    return torch.stack([label_map(i, CLASSES, shape=(2, k, rows, columns)) for i in range(n)])


def random_warps(n: int, length: int, seed: int = 0) -> np.ndarray:
    """Crops, each between small affine maps that reach a little over the edge."""
    generator = np.random.default_rng(seed)
    warps = np.array([[1.0, 0, 0], [0, 1, 0]]) + generator.normal(0, 0.08, (n, length, 2, 3))
    for i in range(n):
        h, w = generator.uniform(0.3, 1, 2)
        top, left = generator.uniform(0, 1 - h), generator.uniform(0, 1 - w)
        warps[i, length // 2] = [[w, 0, left], [0, h, top]]
    return warps.astype(np.float32)


# --- targets against references


def slow_targets(label: np.ndarray, warps: np.ndarray, grid: int, smoothing: float) -> np.ndarray:
    """(grid * grid, K) by the definition: point by point, corner by corner."""
    _, k, rows, columns = label.shape
    logits = np.zeros((CLASSES, rows, columns))
    for j, r, c in itertools.product(range(k), range(rows), range(columns)):
        logits[int(label[1, j, r, c]), r, c] = label[0, j, r, c]
    linear = np.eye(2)
    for warp in warps:
        linear = warp[:, :2] @ linear
    sides = [math.hypot(linear[0, i] * columns, linear[1, i] * rows) / grid for i in range(2)]
    n_x, n_y = (
        min(max(math.ceil(side), 1), math.ceil(cells / grid))
        for side, cells in zip(sides, (columns, rows), strict=True)
    )
    result = []
    for row, column in itertools.product(range(grid), range(grid)):
        total = np.zeros(CLASSES)
        for i, j in itertools.product(range(n_y), range(n_x)):
            x, y, inside = (column + (j + 0.5) / n_x) / grid, (row + (i + 0.5) / n_y) / grid, True
            for (xx, xy, x0), (yx, yy, y0) in warps.tolist():
                x, y = xx * x + xy * y + x0, yx * x + yy * y + y0
                inside = inside and 0 <= x <= 1 and 0 <= y <= 1
            if inside:
                u, v = min(max(x * columns - 0.5, 0), columns - 1), min(max(y * rows - 0.5, 0), rows - 1)
                left, top = int(u), int(v)
                right, bottom = min(left + 1, columns - 1), min(top + 1, rows - 1)
                a, b = u - left, v - top
                total += (1 - b) * ((1 - a) * logits[:, top, left] + a * logits[:, top, right])
                total += b * ((1 - a) * logits[:, bottom, left] + a * logits[:, bottom, right])
        e = np.exp(total / (n_x * n_y))
        result.append(e / e.sum() * (1 - smoothing) + smoothing / CLASSES)
    return np.array(result)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (5, 9)])
@pytest.mark.parametrize("grid", [2, 4, 7])
def test_targets_by_a_slow_reference(rows: int, columns: int, grid: int) -> None:
    maps, warps = random_maps(6, rows, columns), random_warps(6, 3)
    of_class, of_tokens = token_targets(maps, torch.from_numpy(warps), grid, CLASSES, 0.1)
    for i in range(6):
        label = maps[i].double().numpy()
        np.testing.assert_allclose(of_tokens[i], slow_targets(label, warps[i].astype(float), grid, 0.1), atol=2e-5)
        np.testing.assert_allclose(of_class[i], slow_targets(label, warps[i].astype(float), 1, 0.1)[0], atol=2e-5)
    assert torch.allclose(of_tokens.sum(-1), torch.ones(6, grid * grid))


@pytest.mark.parametrize("grid", [1, 5, 14, 24])
def test_targets_of_a_crop_are_roi_align_s(grid: int) -> None:
    """As in the official code: top-5 scattered to K planes, roi_align of the crop, softmax."""
    maps, warps = random_maps(8, 18, 18, 5), torch.from_numpy(random_warps(8, 1))
    (w, left), (h, top) = warps[:, 0, 0, [0, 2]].unbind(1), warps[:, 0, 1, [1, 2]].unbind(1)
    boxes = torch.stack([left, top, left + w, top + h], 1) * 18 - 0.5
    dense = torch.zeros(8, CLASSES, 18, 18).scatter_(1, maps[:, 1].long(), maps[:, 0].float())
    of_class, of_tokens = token_targets(maps, warps, grid, CLASSES, 0.0)
    for target, side in ((of_tokens, grid), (of_class[:, None], 1)):
        rois = torch.cat([torch.arange(8.0)[:, None], boxes], 1)
        expected = roi_align(dense, rois, (side, side)).flatten(2).transpose(1, 2).softmax(-1)
        torch.testing.assert_close(target, expected, atol=2e-5, rtol=0)


def quarters() -> torch.Tensor:
    """A 4 x 4 map: class 0 upper left, 1 upper right, 2 lower left, 3 lower right, logit 8."""
    classes = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return torch.stack([torch.full((4, 4), 8.0), classes.float()])[None, :, None].half()


def test_official_order_by_hand() -> None:
    """The upper right quarter of a 200 x 100 picture: its points are the middles of cells, all of class 1.

    With x and y exchanged the same crop begins at the left edge, half way down: class 2.
    """
    warp = crop_warp(Box(top=0, left=100, height=50, width=100), 200, 100)
    certain = math.exp(8) / (math.exp(8) + CLASSES - 1)
    for crop, label in ((warp, 1), (swapped_axes(warp), 2)):
        of_class, of_tokens = token_targets(quarters(), torch.tensor(crop[None, None]).float(), 2, CLASSES, 0.0)
        assert of_class.argmax() == label and of_class[0, label].item() == pytest.approx(certain)
        assert of_tokens[0, :, label].tolist() == pytest.approx([certain] * 4)
    # A wide low strip over the middle becomes a high narrow one: all four quarters either way, but other tokens.
    strip = crop_warp(Box(top=25, left=0, height=50, width=200), 200, 100)
    plain, swapped = (
        token_targets(quarters(), torch.tensor(crop[None, None]).float(), 2, CLASSES, 0.0)[1].argmax(-1).tolist()
        for crop in (strip, swapped_axes(strip))
    )
    assert plain == swapped == [[0, 1, 2, 3]]
    assert swapped_axes(strip).tolist() == [[0.5, 0, 0.25], [0, 1, 0]]


# --- the picture and its map


WHITE, BLACK = 1, 0
RRC = {"kind": "rrc", "scale": [0.3, 1.0]}
TIMM = {"policy": "timm-inc", "layers": 3, "prob": 1.0}
NEST = {"policy": "nest", "layers": 2, "prob": 1.0}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "crop": {"crop": RRC},
    "crop and operations": {"crop": RRC, "rand_augment": TIMM},
    "operations, then crop": {"crop": RRC, "rand_augment": TIMM, "crop_last": True},
    "nest's operations": {"crop": RRC, "rand_augment": NEST},
    "affine": {"crop": RRC, "affine": {"degrees": 40, "translate": 0.2, "scale": [0.7, 1.4], "shear": 20}},
    "padded": {"resize": 96, "crop": {"kind": "pad", "padding": 30}},
    "centre": {"resize": 120, "crop": "center"},
}


def painted() -> tuple[Image.Image, torch.Tensor]:
    """A black 240 x 160 picture with white areas, and a map of 10 x 10 pixels a cell that says which is which."""
    image = Image.new("RGB", (240, 160))
    draw = ImageDraw.Draw(image)
    for box in ((20, 20, 119, 59), (160, 10, 229, 109), (10, 100, 69, 149), (100, 80, 139, 149)):
        draw.rectangle(box, fill=(255, 255, 255))
    cells = np.asarray(image)[5::10, 5::10, 0] > 0
    label = np.stack([np.full((1, 16, 24), 12.0), np.where(cells, WHITE, BLACK)[None]])
    return image, torch.from_numpy(label).half()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_map_follows_the_picture(name: str) -> None:
    """White tokens are white in the map, black ones black, and what came from outside is nothing in particular."""
    config = AugmentConfig.model_validate(AUGMENTATIONS[name] | {"hflip": 0.5, "normalize": "half"})
    transform, (image, label) = build_train_transform(config, 96), painted()
    drawn = {index: transform.draw(sample_key(3, 0, index)) for index in range(1000)}
    chosen = [i for i, draw in drawn.items() if all(op.op.moves for op in draw.ops)][:40]  # none that changes colours
    assert 10 < sum(drawn[i].flip for i in chosen) < 30
    seen = {"white": 0, "black": 0, "outside": 0}
    for index in chosen:
        pixels, warps = transform.traced(image, 3, 0, index)
        assert torch.equal(pixels, transform(image, 3, 0, index))
        targets = token_targets(label[None], torch.from_numpy(warps[None]), 12, CLASSES, 0.0)[1][0]
        # Patches of one colour are away from what interpolation blurs.
        low, high = pixels[0].unfold(0, 8, 8).unfold(1, 8, 8).reshape(144, 64).aminmax(dim=1)
        white, black, grey = low > 0.99, high < -0.99, torch.maximum(low.abs(), high.abs()) < 0.02
        nothing = targets.amax(-1) < 0.5
        # What these two uncover is black, too.
        outside = black & nothing if name in ("affine", "padded") else grey
        assert (targets.argmax(-1) == WHITE)[white].all()
        assert (targets.argmax(-1) == BLACK)[black & ~outside].all()
        assert nothing[outside].all()
        for kind, found in (("white", white), ("black", black & ~outside), ("outside", outside)):
            seen[kind] += int(found.sum())
    assert seen["white"] > 300 and seen["black"] > 300, seen
    assert (seen["outside"] > 100) == (name not in ("crop", "centre")), seen


def test_official_order_reads_elsewhere() -> None:
    """With x and y exchanged, the maps of most random crops no longer show what the pictures show."""
    config = AugmentConfig.model_validate({"crop": RRC, "hflip": 0.5, "normalize": "half"})
    transform, (image, label) = build_train_transform(config, 96), painted()
    right = {False: 0, True: 0}
    for index, swap in itertools.product(range(40), (False, True)):
        pixels, warps = transform.traced(image, 0, 0, index, swap)
        targets = token_targets(label[None], torch.from_numpy(warps[None]), 12, CLASSES, 0.0)[1][0]
        white = pixels[0].unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2)).flatten() > 0
        right[swap] += int(((targets.argmax(-1) == WHITE) == white).sum())
    assert right[False] > 0.95 * 40 * 144 and right[True] < 0.85 * 40 * 144


# --- batches


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 60 pictures with label maps."""
    root = tmp_path_factory.mktemp("labelled")
    images = make_folder(root / "images", per_class=20)
    maps = make_maps(root / "maps", images, shape=(2, 2, 4, 6))
    prepare(images, root / "shards", PrepOptions(workers=1, shard_samples=16, token_labels=maps))
    return root / "shards" / "train"


def step_dataset(split: Path, rank: int = 0, world_size: int = 1, swap: bool = False) -> StepDataset:
    shards = ShardSet(split)
    order = DataOrder(tuple(shard.samples for shard in shards.manifest.shards), seed=5, batch=16, lanes=4)
    config = AugmentConfig.model_validate({"normalize": "half", "rand_augment": {"policy": "timm-inc"}})
    tokens = TokenLabelOptions(grid=4, mix_token=True, swap_axes=swap)
    transform = build_train_transform(config, 16)
    mix = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
    return StepDataset(shards, order, transform, mix, 16, 3, 2, rank, world_size, tokens)


def tokens_of(batch: Any) -> TokenLabelBatch:
    assert isinstance(batch, TrainBatch) and batch.tokens is not None
    return batch.tokens


def test_a_batch_holds_the_maps_of_its_samples(labelled: Path) -> None:
    dataset = step_dataset(labelled)
    batch = dataset[1]
    assert isinstance(batch, TrainBatch)
    tokens = tokens_of(batch)
    assert tokens.maps.shape == (16, 2, 2, 4, 6) and tokens.warps.shape == (16, 4, 2, 3) and tokens.mix is not None
    for key, label in zip(dataset.shards.keys(batch.samples.tolist()), tokens.maps, strict=True):
        # Keys begin with the position in the source, by which the maps were made.
        assert torch.equal(label, label_map(int(key.split("_")[0]), shape=(2, 2, 4, 6)))


def test_label_maps_change_nothing_else(labelled: Path) -> None:
    dataset = step_dataset(labelled)
    plain = step_dataset(labelled)
    plain.tokens = None
    with_tokens, without = dataset[2], plain[2]
    assert isinstance(with_tokens, TrainBatch) and isinstance(without, TrainBatch) and without.tokens is None
    for a, b in zip((*with_tokens[:4], *with_tokens.mix), (*without[:4], *without.mix), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    swapped = tokens_of(step_dataset(labelled, swap=True)[2])
    assert torch.equal(swapped.maps, tokens_of(with_tokens).maps)
    assert not torch.equal(swapped.warps, tokens_of(with_tokens).warps)


def test_any_number_of_processes_gets_the_same_maps(labelled: Path) -> None:
    whole = tokens_of(step_dataset(labelled)[1])
    for rank in range(2):
        part = tokens_of(step_dataset(labelled, rank, 2)[1])
        assert part.mix is not None and whole.mix is not None
        for i, lane in enumerate(range(rank, 4, 2)):
            ours, theirs = part.rows(slice(4 * i, 4 * i + 4)), whole.rows(slice(4 * lane, 4 * lane + 4))
            assert torch.equal(ours.maps, theirs.maps) and torch.equal(ours.warps, theirs.warps)
            assert all(torch.equal(a, b) for a, b in zip(ours.mix or (), theirs.mix or (), strict=True))


def test_loader_processes_send_them_whole(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_PRELOAD", batches_module._PRELOAD[:2])  # without timm
    dataset = step_dataset(labelled)
    dataset.transform = build_train_transform(AugmentConfig(normalize="half"), 16)
    [batch] = Batches(dataset, range(1, 2), 1, 2, torch.device("cpu"))
    sent, own = tokens_of(batch), tokens_of(dataset[1])
    assert torch.equal(sent.maps, own.maps) and torch.equal(sent.warps, own.warps)
    assert all(torch.equal(a, b) for a, b in zip(sent.mix or (), own.mix or (), strict=True))


def put(place: tuple[int, ...], value: float) -> Callable[[bytearray], None]:
    """Change a number of the map of an `.npy` file."""

    def spoil(file: bytearray) -> None:
        np.frombuffer(file, np.float16, offset=128).reshape(2, 2, 4, 6)[place] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.__setitem__(slice(0, 6), bytes(6)), "its label map is damaged ("),
        (lambda file: file.__setitem__(slice(60, 80), b"(" * 20), "its label map is damaged ("),
        (put((1, 0, 1, 2), 3), "not finite, or of a class that does not exist"),
        (put((1, 1, 0, 0), -1), "not finite, or of a class that does not exist"),
        (put((0, 0, 0, 0), np.nan), "not finite, or of a class that does not exist"),
        (put((1, 0, 0, 0), np.inf), "not finite, or of a class that does not exist"),
    ],
)
def test_a_damaged_map_is_a_bad_sample(
    spoil: Callable[[bytearray], object], said: str, labelled: Path, tmp_path: Path
) -> None:
    """A class that does not exist would end a process on a GPU."""
    split = Path(shutil.copytree(labelled, tmp_path / "train"))
    shards = ShardSet(split)
    [whole] = shards.read([7], tokens=True)
    assert whole.tokens is not None
    file = bytearray(whole.tokens)
    spoil(file)
    path = Path(shards.path_of(7))
    path.write_bytes(path.read_bytes().replace(whole.tokens, bytes(file), 1))
    with pytest.raises(BadSample) as error:
        load_sample(ShardSet(split), 7, 3, tokens=True)
    assert said in error.value.reason and error.value.key == whole.key
    assert load_sample(ShardSet(split), 7, 3).tokens is None
