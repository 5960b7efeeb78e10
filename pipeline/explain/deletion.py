"""The deletion test: does the block that GradCAT names matter more than others? It is masked, and the logit read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.explain.gradcat import Tree, descend
from pipeline.models.nest import Nest


class Deletion(NamedTuple):
    """By how much the logit of the explained class falls when a block is masked, (B,) each.

    Attributes:
        chosen: the block on the path.
        random: another block, drawn evenly.
        lowest: the block of the lowest score in the whole tree.
    """

    chosen: Tensor
    random: Tensor
    lowest: Tensor

    def beats_random(self) -> float:
        """Part of the images in which the chosen block matters more than the random one."""
        return float((self.chosen > self.random).float().mean())

    def beats_lowest(self) -> float:
        """Part of the images in which it matters more than the block of the lowest score."""
        return float((self.chosen > self.lowest).float().mean())


def delete_blocks(
    model: Nest,
    images: Tensor,
    tree: Tree,
    fill: Tensor,
    depth: int,
    seed: int = 0,
) -> Deletion:
    """Mask one of the 2^depth x 2^depth blocks of each image and look at the logit of the predicted class.

    Args:
        model: in evaluation mode.
        images: (B, C, S, S).
        tree: of these images and their predicted classes.
        fill: (C,) colour of the mask, normalised as the images are.
        depth: 1 ... levels - 1; the last are the leaves.
        seed: of the random blocks.
    """
    side = 2**depth
    row, column = descend(tree).blocks[:, depth - 1].unbind(1)
    chosen = row * side + column
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, side * side - 1, (len(images),), generator=generator).to(images.device)
    random = random + (random >= chosen)  # any block but the chosen one
    lowest = tree.scores[depth - 1].flatten(1).argmin(1)

    def drop(block: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(masked(images, block // side, block % side, side, fill))
        return (tree.logits - logits).gather(1, tree.classes[:, None])[:, 0]

    return Deletion(drop(chosen), drop(random), drop(lowest))


def masked(images: Tensor, row: Tensor, column: Tensor, side: int, fill: Tensor) -> Tensor:
    """The images, each with one of side x side blocks in the colour `fill` (C,); `row` and `column` (B,)."""
    place = torch.arange(images.shape[-1], device=images.device) * side // images.shape[-1]
    inside = (place == row[:, None])[:, :, None] & (place == column[:, None])[:, None, :]
    return torch.where(inside[:, None], fill[:, None, None], images)
