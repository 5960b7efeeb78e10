"""The augmentation part of a run's configuration: what is done to each picture, and how batches are mixed.

The models are frozen and refuse unknown keys. Recipes with the source of every value: docs/augmentation.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipeline.config_section import Section
from pipeline.errors import UserError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Interpolation = Literal["bilinear", "bicubic", "random"]
NormalizationName = Literal["imagenet", "cifar10", "cifar100", "half"]

_MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def _require_ordered(name: str, pair: tuple[float, float], low: float, high: float | None = None) -> None:
    if not low < pair[0] <= pair[1] or (high is not None and pair[1] > high):
        limit = "" if high is None else f" and at most {high:g}"
        raise ValueError(f"{name} must be [low, high] with low <= high, above {low:g}{limit}, not {list(pair)}")


class RandomResizedCrop(Section):
    """A random part of the picture, resized to the input size."""

    kind: Literal["rrc"] = "rrc"
    scale: tuple[float, float] = Field(
        default=(0.08, 1.0), description="smallest and largest part of the picture's area"
    )
    ratio: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="smallest and largest width / height of the part"
    )
    sampler: Literal["area", "side"] = Field(
        default="area",
        description="area: uniform area, log-uniform ratio (torchvision, timm); "
        "side: uniform ratio, uniform height (TensorFlow, NesT), which favours smaller parts",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_ordered("scale", self.scale, 0.0, 1.0)
        _require_ordered("ratio", self.ratio, 0.0)
        return self


class PadCrop(Section):
    """Pad every side, then cut out a random square of the input size."""

    kind: Literal["pad"] = "pad"
    padding: PositiveInt = Field(default=4, description="pixels added on each side (NesT on CIFAR: 2)")
    fill: Literal["zero", "reflect"] = Field(default="zero", description="black, or the picture mirrored at its edge")


class CenterCrop(Section):
    """The central square of the input size."""

    kind: Literal["center"] = "center"


class NoCrop(Section):
    """The picture as it is; it must have the input size."""

    kind: Literal["none"] = "none"


def _name_crop_kind(value: Any) -> Any:
    if isinstance(value, str):
        return {"kind": value}
    return {"kind": "rrc"} | value if isinstance(value, dict) else value


CropConfig = Annotated[
    Annotated[RandomResizedCrop | PadCrop | CenterCrop | NoCrop, Field(discriminator="kind")],
    BeforeValidator(_name_crop_kind),
]


class AffineConfig(Section):
    """A small random affine map, for pictures that must not be mirrored, such as digits. It uncovers black pixels."""

    degrees: float = Field(default=0.0, ge=0.0, le=180.0, description="largest rotation to either side, degrees")
    translate: float = Field(default=0.0, ge=0.0, le=1.0, description="largest shift along each axis, part of the side")
    scale: tuple[float, float] = Field(default=(1.0, 1.0), description="smallest and largest magnification")
    shear: float = Field(default=0.0, ge=0.0, lt=90.0, description="largest horizontal shear to either side, degrees")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_ordered("scale", self.scale, 0.0)
        return self


class RandAugmentConfig(Section):
    """RandAugment (Cubuk et al. 2020): a few operations drawn at random, all of about the same magnitude."""

    policy: Literal["nest", "timm-inc"] = Field(
        default="timm-inc",
        description="nest: the 16 operations of NesT's code; timm-inc: timm's rand-mM-mstdS-inc1 (DeiT, HVT, Refiner)",
    )
    layers: PositiveInt = Field(default=2, description="operations drawn per picture, with replacement")
    magnitude: float = Field(default=9.0, ge=0.0, le=10.0, description="mean magnitude on the scale 0..10")
    std: float = Field(
        default=0.5, ge=0.0, description="standard deviation of the magnitude, which is clipped to 0..10"
    )
    prob: Probability = Field(default=0.5, description="probability that a drawn operation is applied")


class ColorJitterConfig(Section):
    """SimCLR v2 colour jitter: brightness, contrast and saturation by 1 ± 0.8 s, hue by ± 0.2 s turns, random order."""

    strength: float = Field(default=0.3, ge=0.0, le=1.25, description="s; NesT on ImageNet: 0.3")
    prob: Probability = Field(default=0.8, description="probability of the jitter")
    gray_prob: Probability = Field(default=0.2, description="probability of turning the picture grey afterwards")


class RandomErasingConfig(Section):
    """Random erasing (Zhong et al. 2020) of one box of the normalised picture."""

    prob: Probability = 0.25
    min_area: float = Field(default=0.02, gt=0.0, le=1.0, description="smallest part of the picture's area")
    max_area: float = Field(default=1 / 3, gt=0.0, le=1.0, description="largest part of the picture's area")
    min_aspect: float = Field(
        default=0.3, gt=0.0, le=1.0, description="smallest height / width; the largest is its inverse"
    )
    mode: Literal["pixel", "const"] = Field(
        default="pixel", description="pixel: N(0, 1) noise; const: 0, the mean colour"
    )
    placement: Literal["inside", "clipped"] = Field(
        default="inside",
        description="inside: the whole box in the picture (timm); clipped: centred anywhere, then cut (NesT)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area:g} is above max_area {self.max_area:g}")
        return self


class Normalization(Section):
    """Mean and standard deviation per channel, of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError("mean and std need one number per channel each, std above 0")
        return self


class AugmentConfig(Section):
    """Everything done to a single picture, in the order of the fields."""

    resize: PositiveInt | None = Field(default=None, description="first bring the shorter side to this many pixels")
    crop: CropConfig = Field(default=RandomResizedCrop(), description="rrc | pad | center | none")
    interpolation: Interpolation = Field(
        default="bicubic",
        description="of resize, crop and timm-inc's geometric operations; random: either, anew each time",
    )
    antialias: bool = Field(
        default=True, description="false: resize by point sampling as in NesT's code, bilinear only"
    )
    crop_last: bool = Field(
        default=False,
        description="true: mirror, affine map and RandAugment act on the whole picture, before the crop "
        "(Refiner with token labels), which costs more time",
    )
    hflip: Probability = Field(default=0.5, description="probability of a horizontal mirror image; 0 for digits")
    affine: AffineConfig | None = None
    rand_augment: RandAugmentConfig | None = None
    color_jitter: ColorJitterConfig | None = None
    normalize: NormalizationName | Normalization = Field(
        default="imagenet", description="imagenet | cifar10 | cifar100 | half (all 0.5), or {mean: [...], std: [...]}"
    )
    random_erasing: RandomErasingConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.antialias and self.interpolation != "bilinear":
            raise ValueError("antialias: false needs interpolation: bilinear")
        if self.crop_last and (self.affine or (self.rand_augment and self.rand_augment.policy == "nest")):
            raise ValueError("crop_last: true works with neither affine nor policy nest, which count in input pixels")
        return self

    def off_device(self) -> str | None:
        """What of it `data.resident` can't do on the device, and what to choose instead; None: it can do all of it."""
        rand = self.rand_augment
        if isinstance(self.crop, RandomResizedCrop):
            return "augment.crop=rrc resizes every picture otherwise (choose pad, center or none)"
        if self.resize is not None:
            return "augment.resize changes the pictures' size (prepare them in it)"
        if self.affine is not None:
            return "augment.affine interpolates (set it to null)"
        if self.color_jitter is not None:
            return "augment.color_jitter works on floats (set it to null)"
        if self.crop_last:
            return "augment.crop_last=true distorts before the crop (set it to false)"
        if rand is not None and rand.policy != "nest":
            return f"augment.rand_augment.policy={rand.policy} interpolates (choose nest, or null)"
        return None

    def mean_std(self, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel.

        Raises:
            UserError: the configured normalisation has another number of channels than the model.
        """
        if self.normalize == "half":
            return (0.5,) * in_chans, (0.5,) * in_chans
        if isinstance(self.normalize, str):
            mean, std = _MEAN_STD[self.normalize]
        else:
            mean, std = self.normalize.mean, self.normalize.std
        if len(mean) != in_chans:
            raise UserError(
                f"augment.normalize has {len(mean)} channels but the model takes {in_chans}: "
                f"set augment.normalize to half, or to {{mean: [...], std: [...]}} with {in_chans} numbers each"
            )
        return mean, std


class EvalTransformConfig(Section):
    """What is done to an evaluation image. It is normalised as in training (`AugmentConfig.normalize`)."""

    resize: Literal["crop_pct", "resize_only", "none"] = Field(
        default="crop_pct",
        description="crop_pct: shorter side to int(img_size / crop_pct), then centre crop; "
        "resize_only: the whole picture to the input size; none: it must have the input size",
    )
    crop_pct: float = Field(
        default=0.875,
        gt=0.0,
        le=2.0,
        description="input size / resized shorter side; above 1 the picture gets a black frame",
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    antialias: bool = Field(default=True, description="false: point sampling as in NesT's code, bilinear only")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.antialias and self.interpolation != "bilinear":
            raise ValueError("antialias: false needs interpolation: bilinear")
        if not self.antialias and self.crop_pct > 1:
            raise ValueError("crop_pct above 1 needs antialias: true")
        return self


class MixConfig(Section):
    """Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and label smoothing."""

    mixup_alpha: float = Field(
        default=0.0, ge=0.0, description="alpha of mixup's Beta(alpha, alpha); 0 turns mixup off"
    )
    cutmix_alpha: float = Field(
        default=0.0, ge=0.0, description="alpha of cutmix's Beta(alpha, alpha); 0 turns cutmix off"
    )
    prob: Probability = Field(default=1.0, description="probability that a lane chunk is mixed at all")
    switch_prob: Probability = Field(default=0.5, description="probability of cutmix where both are on")
    mode: Literal["batch", "sample"] = Field(
        default="batch",
        description="batch: one weight per lane chunk, timm's conventions (DeiT, HVT, Refiner); "
        "sample: one weight per sample, NesT's conventions",
    )
    beta: Literal["exact", "nest_approx"] = Field(
        default="exact", description="exact: Beta(alpha, alpha); nest_approx: NesT's u^(1/alpha) / 2, mode: sample only"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="applied to the one-hot targets before mixing"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta == "nest_approx" and self.mode != "sample":
            raise ValueError("beta: nest_approx needs mode: sample")
        return self

    @property
    def active(self) -> bool:
        """Whether any batch is ever mixed; label smoothing does not count."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)
