"""Other loaders on the same images, each used as its own documentation says.

All decode the same bytes, crop a random part (area 8 to 100 %) to the same side, mirror half of them, and give 8-bit
batches; with the recipe `nest` timm also applies its RandAugment, colour jitter and erasing of the same strength and
normalises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from data_prep.manifest import Manifest
from launch.bench_loader.contender import Contender, Settings

Epochs = Callable[[], Iterator[Any]]


def _torch_loader(dataset: Any, settings: Settings, **options: Any) -> Any:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=settings.batch,
        num_workers=settings.workers,
        drop_last=True,
        prefetch_factor=settings.prefetch if settings.workers else None,
        persistent_workers=settings.workers > 0,
        **options,
    )


def _timm_options(settings: Settings) -> dict[str, Any]:
    if settings.recipe == "crop":
        return {"re_prob": 0.0, "color_jitter": 0.0, "auto_augment": None}
    # Without `-inc1`: Pillow 13 refuses the posterize to 0 bits that it draws now and then.
    return {
        "re_prob": 0.25,
        "re_mode": "pixel",
        "color_jitter": 0.24,
        "color_jitter_prob": 0.8,
        "grayscale_prob": 0.2,
        "auto_augment": "rand-m9-n2-mstd0.5",
    }


def _timm_loader(dataset: Any, settings: Settings) -> Any:
    from timm.data import create_loader, transforms_factory

    options = _timm_options(settings)
    loader = create_loader(
        dataset,
        (3, settings.side, settings.side),
        settings.batch,
        is_training=True,
        num_workers=settings.workers,
        interpolation="bilinear",
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=settings.workers > 0,
        **options,
    )
    if settings.recipe == "nest":
        # `create_loader` drops the colour jitter where there is a RandAugment; NesT has both.
        dataset.transform = transforms_factory.transforms_imagenet_train(
            settings.side,
            interpolation="bilinear",
            color_jitter=(0.24, 0.24, 0.24, 0.06),
            color_jitter_prob=0.8,
            force_color_jitter=True,
            grayscale_prob=0.2,
            auto_augment=options["auto_augment"],
            use_prefetcher=True,
        )
        return loader  # normalises and erases
    return loader.loader  # 8-bit batches, before `PrefetchLoader` normalises


def _timm_folder(settings: Settings) -> Epochs:
    from timm.data import create_dataset

    loader = _timm_loader(create_dataset("", str(settings.scene.files), is_training=True), settings)
    return lambda: iter(loader)


def _timm_wds(settings: Settings) -> Epochs:
    from timm.data import create_dataset

    assert settings.scene.tars is not None, "what it reads"
    shards = Manifest.load(settings.scene.tars).shards
    first, last = (shards[i].file.removesuffix(".tar")[-6:] for i in (0, -1))
    stem = shards[0].file.removesuffix(f"{first}.tar")
    dataset = create_dataset(
        "wds/rookery",
        str(settings.scene.tars),
        split=f"{stem}{{{first}..{last}}}.tar|{sum(shard.samples for shard in shards)}",
        is_training=True,
        batch_size=settings.batch,
        input_key="jpg;png;webp",
    )
    loader = _timm_loader(dataset, settings)
    return lambda: iter(loader)


class _TorchvisionFiles(torch.utils.data.Dataset):
    def __init__(self, settings: Settings) -> None:
        from torchvision.transforms import v2

        assert settings.scene.files is not None, "what it reads"
        self.files = sorted(path for path in settings.scene.files.rglob("*") if path.is_file())
        self.transform = v2.Compose([v2.RandomResizedCrop(settings.side, antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        from torchvision.io import ImageReadMode, decode_image

        return self.transform(decode_image(str(self.files[index]), ImageReadMode.RGB))


def _torchvision(settings: Settings) -> Epochs:
    loader = _torch_loader(_TorchvisionFiles(settings), settings, shuffle=True)
    return lambda: iter(loader)


class _PillowCrop:
    """Crop and flip of a Pillow image to a (3, side, side) uint8 tensor."""

    def __init__(self, side: int) -> None:
        from torchvision import transforms

        self.steps = transforms.Compose([transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip()])

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(self.steps(image.convert("RGB")))).permute(2, 0, 1)


def _webdataset(settings: Settings) -> Epochs:
    import webdataset

    assert settings.scene.tars is not None, "what it reads"
    tars = sorted(str(path) for path in settings.scene.tars.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png;webp", "cls")
        .map_tuple(_PillowCrop(settings.side))
        .batched(settings.batch, partial=False)
    )
    loader = webdataset.WebLoader(
        dataset,
        batch_size=None,
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch,
        persistent_workers=True,
    )
    return lambda: iter(loader)


def _ffcv(settings: Settings) -> Epochs:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    side = (settings.side, settings.side)
    loader = Loader(
        str(settings.scene.beton),
        batch_size=settings.batch,
        num_workers=settings.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            # In another order its compiler never ends.
            "image": [RandomResizedCropRGBImageDecoder(side), RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    return lambda: iter(loader)


PEERS = [
    Contender("timm, image folder", "timm", "files", ("crop", "nest"), _timm_folder),
    Contender("timm, WebDataset", "timm", "tars", ("crop", "nest"), _timm_wds),
    Contender("torchvision decode", "torchvision", "files", ("crop",), _torchvision),
    Contender("webdataset, Pillow", "webdataset", "tars", ("crop",), _webdataset),
    Contender("FFCV", "ffcv", "beton", ("crop",), _ffcv),
]
