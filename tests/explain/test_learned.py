"""GradCAT on models that have learned something: does the path lead to what decides?

With conductance, the default, and with occlusion it nearly always does. With the algorithm as it is understood it does
far better than chance with the sign +, and worse with -; it is far from certain. `pytest -s` prints the figures that
docs/explain.md quotes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.explain.deletion import Deletion, delete_blocks, masked
from pipeline.explain.gradcat import Tree, descend, grow_tree
from pipeline.explain.methods import Options
from pipeline.explain.names import Scores
from pipeline.explain.scores import score_tree
from pipeline.models.nest import Nest
from tests.explain.learned import digit_batches, digits, mark_batches, marks, trained

PLUS, CHANNELS, OCCLUDE = Scores.gradient, Scores.channel_weights, Scores.occlusion
MINUS, BEFORE = "gradient, sign -1", "gradient, before the last norm"
# How trees are grown: model, images, colour of the plain picture -> tree.
KINDS: dict[str, Callable[[Nest, Tensor, Tensor], Tree]] = {
    **{kind: lambda model, images, plain, kind=kind: score_tree(kind, model, images, plain=plain) for kind in Scores},
    MINUS: lambda model, images, _: grow_tree(model, images, sign=-1),
    BEFORE: lambda model, images, _: grow_tree(model, images, before_norm=True),
}
DEFAULT = Options().scores


def test_masks_cover_one_block() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fill = torch.tensor([2.0, 3.0, 4.0])
    done = masked(images, torch.tensor([0, 3]), torch.tensor([1, 2]), 4, fill)
    expected = images.clone()
    expected[0, :, 0:2, 2:4] = expected[1, :, 6:8, 4:6] = fill[:, None, None]
    assert torch.equal(done, expected)


def test_the_leaf_of_two_levels_holds_the_mark() -> None:
    """Blocks of 4x4 tokens, whose last level doesn't mix them any more: the leaf is the quadrant with the mark."""
    shape = {"num_levels": 2, "embed_dims": [24, 48], "num_heads": [1, 2], "depths": [1, 0]}
    model = trained(mark_batches(1), 250, 4e-3, num_classes=4, **shape)
    images, labels, blocks = marks(400, torch.Generator().manual_seed(2))
    found = {}
    for kind, grow in KINDS.items():
        tree = grow(model, images, torch.zeros(1))
        found[kind] = float((descend(tree).blocks[:, -1] == blocks // 2).all(1).float().mean())
        print(f"two levels, {kind}: leaf {found[kind]:.3f}")
    assert (tree.classes == labels).float().mean() > 0.98
    assert min(found[DEFAULT], found[PLUS], found[OCCLUDE]) >= 0.95 and found[MINUS] < 0.05


def test_the_path_leads_to_a_planted_mark() -> None:
    """One of 16 leaves decides: chance finds it in 6 % of the images, and its quadrant in 25 %."""
    model = trained(mark_batches(1), 200, 5e-3, num_classes=4, depths=1, embed_dims=[16, 32, 48], num_heads=[1, 2, 3])
    images, labels, blocks = marks(200, torch.Generator().manual_seed(2))
    found: dict[str, tuple[float, float]] = {}
    for kind, grow in KINDS.items():
        tree = grow(model, images, torch.zeros(1))
        path = descend(tree)
        hits = [(path.blocks[:, depth] == blocks // 2 ** (1 - depth)).all(1) for depth in (0, 1)]
        quadrant, leaf = (float(hit.float().mean()) for hit in hits)
        found[kind] = quadrant, leaf
        print(f"{kind}: quadrant {quadrant:.3f}, leaf {leaf:.3f}")
    assert (tree.classes == labels).float().mean() > 0.98
    assert found[PLUS][0] > 0.4 and found[PLUS][1] > 0.15
    assert found[CHANNELS][0] == found[PLUS][0] and found[CHANNELS][1] > 0.25
    assert found[MINUS][0] < 0.3 and found[MINUS][1] < 0.15
    assert found[BEFORE][0] < found[PLUS][0]
    assert min(*found[DEFAULT], *found[OCCLUDE]) >= 0.95


def test_what_is_masked_matters() -> None:
    """On digits, on average: the chosen block more than a random one, the one that the other sign chooses less."""
    (images, labels), (others, classes) = digits()
    model = trained(digit_batches(images, labels, 1), 150, 3e-3, 0.1, num_classes=10, depths=[2, 1, 0])
    with torch.no_grad():
        assert (model(others).argmax(1) == classes).float().mean() > 0.95
    done: dict[tuple[str, int], Deletion] = {}
    for kind, grow in KINDS.items():
        for name, fill in (("mean colour", images.mean()), ("black", torch.tensor(-1.0))):
            tree = grow(model, others, fill[None])
            for depth in (1, 2):
                fallen = delete_blocks(model, others, tree, fill[None], depth)
                if kind in (DEFAULT, OCCLUDE):
                    assert fallen.beats_random() >= 0.8 and fallen.beats_lowest() >= 0.9
                done.setdefault((kind, depth), fallen)  # of the mean colour
                means = ", ".join(f"{which} {float(drop.mean()):.2f}" for which, drop in fallen._asdict().items())
                print(
                    f"{kind}, {name}, depth {depth}: beats random {fallen.beats_random():.2f}, "
                    f"lowest {fallen.beats_lowest():.2f}; {means}"
                )
    for depth in (1, 2):
        chosen, random = done[PLUS, depth].chosen.mean(), done[PLUS, depth].random.mean()
        assert chosen > 1.2 * random, (depth, chosen, random)
        assert done[PLUS, depth].beats_random() > 0.5
        assert done[MINUS, depth].chosen.mean() < min(random, chosen)
    colours = {"grey": 0.0, "mean colour": float(images.mean()), "black": -1.0, "white": 1.0}
    for plain, value in colours.items():
        tree = score_tree(DEFAULT, model, others, plain=torch.tensor([value]))
        for mask, colour in colours.items():
            fallen = delete_blocks(model, others, tree, torch.tensor([colour]), 2)
            print(f"plain {plain}, mask {mask}: {fallen.beats_random():.2f} / {fallen.beats_lowest():.2f}")
            if plain == mask:  # what it was asked
                assert fallen.beats_random() >= 0.9 and fallen.beats_lowest() >= 0.95
            elif {plain, mask} == {"black", "white"}:  # the opposite
                assert fallen.beats_random() < 0.5
    channels = done[CHANNELS, 2]
    assert channels.chosen.mean() > 2 * channels.random.mean()
    assert channels.beats_random() > 0.6 and channels.beats_lowest() > 0.6
