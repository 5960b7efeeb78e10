"""GradCAT on models that have learned something: does the path lead to what decides?

It does far better than chance with the sign +, and worse than chance with -, which is what is tested. It is far from
certain; `pytest -s` prints the figures that docs/explain.md quotes.
"""

from __future__ import annotations

import torch

from pipeline.explain.deletion import Deletion, delete_blocks, masked
from pipeline.explain.gradcat import descend, grow_tree
from tests.explain.learned import digit_batches, digits, mark_batches, marks, trained


def test_masks_cover_one_block() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fill = torch.tensor([2.0, 3.0, 4.0])
    done = masked(images, torch.tensor([0, 3]), torch.tensor([1, 2]), 4, fill)
    expected = images.clone()
    expected[0, :, 0:2, 2:4] = expected[1, :, 6:8, 4:6] = fill[:, None, None]
    assert torch.equal(done, expected)


def test_the_path_leads_to_a_planted_mark() -> None:
    """One of 16 leaves decides: chance finds it in 6 % of the images, and its quadrant in 25 %."""
    model = trained(mark_batches(1), 200, 5e-3, num_classes=4, depths=1, embed_dims=[16, 32, 48], num_heads=[1, 2, 3])
    images, labels, blocks = marks(200, torch.Generator().manual_seed(2))
    found: dict[tuple[int, bool], tuple[float, float]] = {}
    for sign in (1, -1):
        for before_norm in (False, True):
            tree = grow_tree(model, images, None, sign, before_norm)
            path = descend(tree)
            hits = [(path.blocks[:, depth] == blocks // 2 ** (1 - depth)).all(1) for depth in (0, 1)]
            quadrant, leaf = (float(hit.float().mean()) for hit in hits)
            found[sign, before_norm] = quadrant, leaf
            print(f"sign {sign:+d}, before the last norm {before_norm}: quadrant {quadrant:.3f}, leaf {leaf:.3f}")
    assert (tree.classes == labels).float().mean() > 0.98
    assert found[1, False][0] > 0.4 and found[1, False][1] > 0.15
    assert found[-1, False][0] < 0.3 and found[-1, False][1] < 0.15
    assert found[1, True][0] < found[1, False][0]


def test_what_is_masked_matters() -> None:
    """On digits, on average: the chosen block more than a random one, the one that the other sign chooses less."""
    (images, labels), (others, classes) = digits()
    model = trained(digit_batches(images, labels, 1), 150, 3e-3, 0.1, num_classes=10, depths=[2, 1, 0])
    with torch.no_grad():
        assert (model(others).argmax(1) == classes).float().mean() > 0.95
    done: dict[tuple[int, int], Deletion] = {}
    for sign in (1, -1):
        for before_norm in (False, True):
            for name, fill in (("mean colour", images.mean()), ("black", torch.tensor(-1.0))):
                for depth in (1, 2):
                    fallen = delete_blocks(model, others, fill[None], depth, sign, before_norm)
                    if name == "mean colour" and not before_norm:
                        done[sign, depth] = fallen
                    means = ", ".join(f"{which} {float(drop.mean()):.2f}" for which, drop in fallen._asdict().items())
                    print(
                        f"sign {sign:+d}, before the last norm {before_norm}, {name}, depth {depth}: "
                        f"beats random {fallen.beats_random():.3f}, lowest {fallen.beats_lowest():.3f}; {means}"
                    )
    for depth in (1, 2):
        chosen, random = done[1, depth].chosen.mean(), done[1, depth].random.mean()
        assert chosen > 1.2 * random, (depth, chosen, random)
        assert done[1, depth].beats_random() > 0.5
        assert done[-1, depth].chosen.mean() < random
        assert done[1, depth].chosen.mean() > done[-1, depth].chosen.mean()
