"""What a training step minimises: cross-entropy of the class, of every token, and the likeness of attention maps.

Refiner with token labels (official file `loss/cross_entropy.py`, RelabelCrossEntropy)::

    cls_weight * CE(class token) + dense_weight * CE(patch tokens) + cos_weight * similarity / cos_pairs

Every other recipe has the first term alone.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_prep.manifest import Manifest
from pipeline.config import ObjectiveConfig, RunConfig
from pipeline.data.augment.mixing import MixParams, mix_targets, soft_target_cross_entropy
from pipeline.data.augment.token_labels import TokenLabelBatch, token_targets
from pipeline.data.order import DataOrder
from pipeline.errors import UserError
from pipeline.models import DenseOutput, DenseRequest, ImageModel


class Targets(NamedTuple):
    """What B samples should be told apart as.

    Attributes:
        classes: (B, K) distributions, for the class token or the one set of logits.
        tokens: (B, N, K) distributions of the patch tokens; None: they have none.
    """

    classes: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Attributes:
        config: weights and switches.
        num_classes: K.
        grid: tokens on a side; None without token labels.
    """

    config: ObjectiveConfig
    num_classes: int
    grid: int | None = None

    def request(self, tokens: TokenLabelBatch | None = None) -> DenseRequest | None:
        """What the model has to give besides logits, for these samples; None: nothing."""
        pairs = self.config.cos_pairs if self.config.cos_weight else 0
        if tokens is not None and tokens.mix is not None:
            return DenseRequest(tokens.mix.partner, tokens.mix.box, pairs)
        return DenseRequest(map_pairs=pairs) if pairs or self.config.token_labels else None

    def targets(self, classes: Tensor, tokens: TokenLabelBatch | None, mix: MixParams) -> Targets:
        """Targets of samples that are whole lane chunks.

        Args:
            classes: (B, K) mixed targets by the labels of the pictures; token labels take their place.
            tokens: label maps of the samples.
            mix: how the samples' pictures are mixed; their targets are mixed with the same weights.
        """
        if tokens is None or self.grid is None:
            return Targets(classes)
        args = (self.grid, self.num_classes, mix.label_smoothing)
        of_class, of_tokens = (mix_targets(t, mix) for t in token_targets(tokens.maps, tokens.warps, *args))
        if tokens.mix is not None:
            own = tokens.mix.own[:, None]
            of_class = of_class * own + of_class[tokens.mix.partner] * (1 - own)
        return Targets(of_class, of_tokens)

    def loss(self, output: Tensor | DenseOutput, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the samples, and its parts before they are weighed; all 0-D float32."""
        config = self.config
        if isinstance(output, Tensor):
            return config.cls_weight * soft_target_cross_entropy(output, targets.classes), {}
        parts = {"loss_cls": soft_target_cross_entropy(output.logits, targets.classes)}
        loss = config.cls_weight * parts["loss_cls"]
        if targets.tokens is not None:
            assert output.tokens is not None, "check_objective has seen token logits"
            parts["loss_tokens"] = soft_target_cross_entropy(output.tokens.flatten(0, 1), targets.tokens.flatten(0, 1))
            loss = loss + config.dense_weight * parts["loss_tokens"]
        if output.similarity is not None:
            parts["map_similarity"] = output.similarity / config.cos_pairs
            loss = loss + config.cos_weight * parts["map_similarity"]
        return loss, parts


def forward(model: nn.Module, images: Tensor, request: DenseRequest | None) -> Tensor | DenseOutput:
    """The model's answer: logits, or a `DenseOutput` to a request."""
    return model(images) if request is None else model(images, dense=request)


def sum_of_outputs(model: nn.Module, images: Tensor, config: ObjectiveConfig) -> Tensor:
    """A number whose backward reaches every parameter that the loss will reach."""
    output = forward(model, images, Objective(config, 0).request())
    outputs = (output,) if isinstance(output, Tensor) else output
    return torch.stack([part.float().sum() for part in outputs if part is not None]).sum()


def check_objective(
    config: RunConfig, model: ImageModel, train: Manifest, order: DataOrder, world_size: int
) -> int | None:
    """Make sure that model, data and batch can serve the objective.

    Args:
        model: the model on the meta device.

    Returns:
        Tokens on a side of the model's grid where they have labels, else None.

    Raises:
        UserError: they can't; the message names the key to change.
    """
    objective = config.objective
    if "dense" not in inspect.signature(model.forward).parameters:
        if objective.token_labels or objective.cos_weight:
            key = "token_labels=true" if objective.token_labels else f"cos_weight={objective.cos_weight:g}"
            raise UserError(
                f"objective.{key}, but model.name={config.model.name} gives neither token logits nor attention maps; "
                "choose a refiner_vit model, or leave the key out"
            )
        return None
    has_tokens = _try(model, objective).tokens is not None
    if not objective.token_labels:
        if has_tokens:
            raise UserError(
                f"model.name={config.model.name} has an aux head, which only token labels train; "
                "set model.options.aux_head=false, or objective.token_labels=true with shards that have label maps"
            )
        return None
    if not has_tokens:
        raise UserError(
            "objective.token_labels=true trains the model's aux head, and it has none; "
            "set model.options.aux_head=true, or objective.token_labels=false"
        )
    grid: int | None = getattr(model, "token_grid", None)
    if grid is None:
        raise UserError("objective.token_labels=true needs tokens that stay on a grid; leave out model.options.pool")
    if train.token_labels is None:
        raise UserError(
            f"objective.token_labels=true, but the shards of data.train={config.data.train} have no label maps; "
            "prepare them with `rookery prep SOURCE OUT --token-labels DIR`, or set objective.token_labels=false"
        )
    _check_chunks(config, order, world_size)
    return grid


def _try(model: ImageModel, config: ObjectiveConfig) -> DenseOutput:
    images = torch.empty(2, model.in_chans, model.img_size, model.img_size, device="meta")
    pairs = config.cos_pairs if config.cos_weight else 0
    try:
        with torch.no_grad():
            return model(images, dense=DenseRequest(map_pairs=pairs))
    except UserError as error:
        raise UserError(f"objective.cos_pairs={pairs}: {error}; choose fewer, or objective.cos_weight=0") from error


def _check_chunks(config: RunConfig, order: DataOrder, world_size: int) -> None:
    if config.objective.mix_token and order.chunk < 2:
        raise UserError(
            f"objective.mix_token=true takes partners from the same lane, but data.lanes={order.lanes} leaves one "
            f"sample a step to each; set data.lanes to {order.batch // 2} or fewer, or objective.mix_token=false"
        )
    lanes = order.lanes // world_size
    if lanes % config.train.accumulate:
        raise UserError(
            f"objective.token_labels=true wants whole lane chunks in a micro-batch, but train.accumulate="
            f"{config.train.accumulate} does not divide the {lanes} lanes that each of {world_size} processes has of "
            f"data.lanes={order.lanes}; set train.accumulate to a divisor of {lanes}"
        )
