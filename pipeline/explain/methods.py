"""One batch of pictures explained by one method: what the JSON says, and what is drawn."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pipeline.data.augment.evaluation import EvalTransform
from pipeline.errors import UserError
from pipeline.explain.cam import check_cam, class_activation, enlarged
from pipeline.explain.gradcat import check_tree, descend
from pipeline.explain.localize import FOUND, THRESHOLD, Box, best_iou, box_of
from pipeline.explain.names import Scores
from pipeline.explain.pages import block_box, boxed, gradcat_page, heat_page, heated, nested
from pipeline.explain.pictures import Picture, in_original, shown
from pipeline.explain.rollout import check_rollout, relevance, roll_out
from pipeline.explain.scores import score_tree
from pipeline.explain.similarity import token_similarity
from pipeline.models import ImageModel


@dataclass(frozen=True)
class Subject:
    """A model to be explained.

    Attributes:
        model: in evaluation mode.
        name: its registered name.
        classes: names of its outputs.
        transform: from a picture to its input.
    """

    model: ImageModel
    name: str
    classes: list[str]
    transform: EvalTransform

    def class_index(self, text: str) -> int:
        """The class of this name, or else of this number.

        Raises:
            UserError: there is none; the message has the nearest names.
        """
        if text in self.classes:
            return self.classes.index(text)
        composed = [unicodedata.normalize("NFC", name) for name in (text, *self.classes)]  # as a terminal may not write
        if composed[0] in composed[1:]:
            return composed.index(composed[0], 1) - 1
        if text.isdecimal() and int(text) < len(self.classes):
            return int(text)
        if text.isdecimal():
            raise UserError(f"--class {text}: the model has {len(self.classes)} classes, 0 to {len(self.classes) - 1}")
        close = difflib.get_close_matches(text, self.classes, n=3, cutoff=0.5)
        mend = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(self.classes[:5])} ..."
        raise UserError(f"--class {text}: the model has no such class; {mend}")

    def other_reading(self, text: str) -> str | None:
        """What `text` also stands for: the number of another class than the one that it names."""
        index = self.class_index(text)
        if not text.isdecimal() or int(text) == index or int(text) >= len(self.classes):
            return None
        return (
            f"--class {text}: the class called {self.classes[index]} is explained (number {index}); class number "
            f"{int(text)} is {self.classes[int(text)]}"
        )


@dataclass(frozen=True)
class Options:
    """How to explain.

    Attributes:
        wanted: the class; None: the predicted one of each image.
        scores: of GradCAT's tree.
        sign: of these scores.
        plain: (C,) colour that pictures fade to, normalised; None: 0.
        threshold: of a box from CAM.
        truths: by name of the picture, boxes in its pixels.
    """

    wanted: int | None = None
    scores: Scores = Scores.conductance
    sign: int = 1
    plain: Tensor | None = None
    threshold: float = THRESHOLD
    truths: Mapping[str, Sequence[Box]] = field(default_factory=dict)


class Explained(NamedTuple):
    """An image's explanation.

    Attributes:
        record: for the JSON.
        page: the overlay; None for a method that draws all images together.
        panel: for the contact sheet.
    """

    record: dict[str, Any]
    page: Image.Image | None
    panel: Image.Image | None

    def lines(self) -> list[str]:
        """The text for the page and the contact sheet."""
        predicted, explained = self.record["predicted"], self.record.get("class", self.record["predicted"])
        text = [self.record["file"], f"predicted {_answer(predicted)}"]
        return text if explained == predicted else [*text, f"explained {_answer(explained)}"]


def _gradcat(subject: Subject, pictures: Sequence[Picture], images: Tensor, options: Options) -> list[Explained]:
    model, classes = check_tree(subject.model), _classes(options, images)
    tree = score_tree(options.scores, model, images, classes, options.sign, options.plain)
    path = descend(tree)
    explained = []
    for i, (picture, record) in enumerate(_records(subject, pictures, tree.logits, tree.classes)):
        blocks, depth = path.blocks[i].tolist(), path.children.shape[1]
        record["steps"] = [
            {
                "level": depth + 1 - d,
                "scores": path.scores[i, d].tolist(),
                "child": int(path.children[i, d]),
                "block": blocks[d],
                **_boxes(subject, picture, block_box(blocks[d][0], blocks[d][1], d + 1)),
            }
            for d in range(depth)
        ]
        image = shown(picture.pixels, subject.transform)
        text = Explained(record, None, None).lines()
        drawn = gradcat_page(image, text, options.scores, path.scores[i].cpu().numpy(), blocks)
        explained.append(Explained(record, drawn, nested(image, blocks)))
    return explained


def _cam(subject: Subject, pictures: Sequence[Picture], images: Tensor, options: Options) -> list[Explained]:
    logits, classes, maps = class_activation(check_cam(subject.model), images, _classes(options, images))
    side = subject.model.img_size
    explained = []
    for i, (picture, record) in enumerate(_records(subject, pictures, logits, classes)):
        left, top, right, bottom = box_of(enlarged(maps[i : i + 1], side)[0].cpu().numpy(), options.threshold)
        found: Box = (left / side, top / side, right / side, bottom / side)
        record |= {"cam": maps[i].tolist(), **_boxes(subject, picture, found)}
        truths = options.truths.get(picture.name, [])
        caption = "CAM"
        if truths:
            record["iou"] = best_iou(record["original_box"], truths)
            record["found"] = record["iou"] >= FOUND
            caption += f", IoU {record['iou']:.2f} with the given box (white)"
        image, heat = shown(picture.pixels, subject.transform), maps[i].cpu().numpy()
        given = [_in_input(truth, picture, subject.transform) for truth in truths]
        drawn = heat_page(image, Explained(record, None, None).lines(), [(caption, heat)], found, given)
        explained.append(Explained(record, drawn, boxed(heated(image, heat), found, given)))
    return explained


def _rollout(subject: Subject, pictures: Sequence[Picture], images: Tensor, options: Options) -> list[Explained]:
    model = check_rollout(subject.model)
    rolled = roll_out(model, images)
    maps = {"before": relevance(model, rolled.before)}
    if rolled.after is not None:
        maps["after"] = relevance(model, rolled.after)
    captions = {"before": "attention roll-out", "after": "of the refined maps"}
    if rolled.after is not None:
        captions["before"] += ", before refinement"
    explained = []
    for i, (picture, record) in enumerate(_records(subject, pictures, rolled.logits, None)):
        record["rollout"] = {which: values[i].tolist() for which, values in maps.items()}
        image = shown(picture.pixels, subject.transform)
        heat = [(captions[which], values[i].cpu().numpy()) for which, values in maps.items()]
        drawn = heat_page(image, Explained(record, None, None).lines(), heat)
        explained.append(Explained(record, drawn, heated(image, heat[-1][1])))
    return explained


def _similarity(subject: Subject, pictures: Sequence[Picture], images: Tensor, options: Options) -> list[Explained]:
    logits, similarities = token_similarity(subject.model, images)
    if similarities.isnan().all():
        raise UserError(f"{subject.name}: its images are single tokens, which have no pairs to compare")
    records = _records(subject, pictures, logits, None)
    return [
        Explained({**record, "similarity": row.tolist()}, None, None)
        for (_, record), row in zip(records, similarities, strict=True)
    ]


_Method = Callable[[Subject, Sequence[Picture], Tensor, Options], list[Explained]]
# In the order of preference.
METHODS: dict[str, _Method] = {"gradcat": _gradcat, "cam": _cam, "rollout": _rollout, "similarity": _similarity}
_CHECKS: dict[str, Callable[[ImageModel], object]] = {"gradcat": check_tree, "cam": check_cam, "rollout": check_rollout}


def available(model: ImageModel) -> list[str]:
    """The methods that this model can be explained by."""
    names = []
    for name in METHODS:
        try:
            _CHECKS.get(name, bool)(model)
        except UserError:
            continue
        names.append(name)
    return names


def choose_method(subject: Subject, asked: str | None) -> str:
    """The method asked for, or the first that the model can be explained by.

    Raises:
        UserError: it can't be by this one.
    """
    there = available(subject.model)
    if asked is None or asked in there:
        return asked or there[0]
    try:
        _CHECKS[asked](subject.model)
    except UserError as error:
        raise UserError(f"{subject.name}: {error}; choose --method {' or '.join(there)}") from error
    raise AssertionError("a method that isn't available says why")


def explain(subject: Subject, pictures: Sequence[Picture], method: str, options: Options) -> list[Explained]:
    """Explain a batch."""
    device = next(subject.model.parameters()).device
    images = torch.stack([picture.pixels for picture in pictures]).to(device)
    return METHODS[method](subject, pictures, images, options)


def _classes(options: Options, images: Tensor) -> Tensor | None:
    return None if options.wanted is None else torch.full((len(images),), options.wanted, device=images.device)


def _records(
    subject: Subject, pictures: Sequence[Picture], logits: Tensor, classes: Tensor | None
) -> list[tuple[Picture, dict[str, Any]]]:
    parts = logits.float().softmax(1)
    records = []
    for i, picture in enumerate(pictures):

        def answer(number: int, i: int = i) -> dict[str, Any]:
            name = subject.classes[number]
            return {
                "index": number,
                "name": name,
                "logit": float(logits[i, number]),
                "probability": float(parts[i, number]),
            }

        record = {"file": picture.name, "size": list(picture.size), "predicted": answer(int(logits[i].argmax()))}
        if classes is not None:
            record["class"] = answer(int(classes[i]))
        records.append((picture, record))
    return records


def _boxes(subject: Subject, picture: Picture, part: Box) -> dict[str, Box]:
    side = subject.model.img_size
    box: Box = (part[0] * side, part[1] * side, part[2] * side, part[3] * side)
    return {"box": box, "original_box": in_original(box, picture.size, subject.transform)}


def _in_input(box: Box, picture: Picture, transform: EvalTransform) -> Box:
    """A box of the original in parts of the input, cut at its edges."""
    place, side = transform.placement(*picture.size), transform.img_size
    scale = (place.width / picture.size[0], place.height / picture.size[1])
    corner = (place.left, place.top)
    left, top, right, bottom = (
        min(max((value * scale[i % 2] - corner[i % 2]) / side, 0.0), 1.0) for i, value in enumerate(box)
    )
    return left, top, right, bottom


def _answer(answer: Mapping[str, Any]) -> str:
    return f"{answer['name']} ({answer['probability']:.1%})"
