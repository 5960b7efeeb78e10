"""`rookery explain`: what in a picture a trained model goes by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.wording import printable
from launch.explain_folder import CHART_NAME, JSON_NAME, SHEET_NAME, clear_folder, page_name, save_chart, save_picture
from launch.export_cli import Weights
from pipeline.errors import UserError
from pipeline.explain.names import Method, Scores
from pipeline.tracking.files import check_place

if TYPE_CHECKING:
    from pipeline.data.augment.evaluation import EvalTransform
    from pipeline.explain.localize import Box
    from pipeline.explain.methods import Explained, Options, Subject
    from pipeline.explain.pictures import Picture

# Pictures on the contact sheet, and side by side there.
_SHEET, _COLUMNS = 48, 4


def explain(
    run: Annotated[Path, typer.Argument(help="run directory, checkpoint, or directory with exported weights")],
    images: Annotated[list[Path], typer.Argument(help="images, and folders of them", metavar="IMAGE...")],
    out: Annotated[Path, typer.Option(help="folder for overlays, contact sheet and JSON")] = Path("explain"),
    method: Annotated[
        Method | None,
        typer.Option(
            help="gradcat: path to the block that speaks for the class (NesT); cam: class activation map (NesT); "
            "rollout: attention roll-out (HVT, Refiner, DeiT); similarity: how alike tokens become with depth (all); "
            "default: the first that the model has"
        ),
    ] = None,
    wanted: Annotated[
        str | None, typer.Option("--class", help="name or number of the class to explain; default: the predicted one")
    ] = None,
    scores: Annotated[
        Scores | None,
        typer.Option(
            help="gradcat: conductance (the default), what the logit loses while blocks fade, 17 forward and backward "
            "passes; occlusion, what it loses without a block, a forward pass for each; gradient, map times gradient, "
            "the paper's algorithm; channel-weights, the same with one weight per channel, as in Grad-CAM"
        ),
    ] = None,
    sign: Annotated[
        int, typer.Option(help="gradcat: +1, high scores raise the logit; -1, the sign that the paper prints")
    ] = 1,
    plain: Annotated[
        str | None,
        typer.Option(
            metavar="COLOUR",
            help="conductance and occlusion: what takes the place of a block, such as black or #808080; default: 0 "
            "after normalisation",
        ),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(help="cam: JSON file to compare its boxes with: by image, lists of left, top, right, bottom"),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="cam: a box holds what is above this part of the map's range; default: 0.2")
    ] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="of a run; last: its newest checkpoint; default: final, else last")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward and backward")] = 16,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=f"where to write the figures; default: {JSON_NAME} in --out")
    ] = None,
) -> None:
    """Show what in a picture a trained model goes by: overlays, and the figures as JSON.

    Exit status: 0 explained, 2 a mistake in the arguments.
    """
    _check(method, sign, boxes, threshold)
    json_file = json_file or out / JSON_NAME
    check_place(out, "--out")
    _check_json(json_file, out)
    # Imported here because torch takes seconds, which every other command and `--help` would pay.
    from pipeline.explain import methods
    from pipeline.explain.localize import THRESHOLD
    from pipeline.explain.pictures import find_pictures

    truths = {} if boxes is None else read_boxes(boxes)
    files = find_pictures(images)
    if truths and not any(file.name in truths for file in files):
        raise UserError(
            f"{boxes}: has boxes of none of these images; its keys are names of files, such as {files[0].name}"
        )
    twice = sorted({file.name for file in files if file.name in truths and sum(f.name == file.name for f in files) > 1})
    if twice:
        raise UserError(f"{boxes}: there are several images called {twice[0]}; explain their folders one by one")
    subject = _subject(run, weights)
    chosen = methods.choose_method(subject, "cam" if boxes is not None or threshold is not None else method)
    _check_fit(chosen, wanted, sign, scores, plain)
    also = None if wanted is None else subject.other_reading(wanted)
    if also is not None:
        typer.echo(also, err=True)
    options = methods.Options(
        None if wanted is None else subject.class_index(wanted),
        scores or Scores.conductance,
        sign,
        None if plain is None else subject.transform.colour(_rgb(plain)),
        THRESHOLD if threshold is None else threshold,
        truths,
    )
    explained: list[Explained] = []
    left_out: list[str] = []
    for batch in _batches(files, set(images), subject.transform, batch_size, left_out):
        if not explained:
            clear_folder(out)
        some, pictures = zip(*batch, strict=True)
        for file, one in zip(some, methods.explain(subject, pictures, chosen, options), strict=True):
            one.record["path"] = str(file)
            if one.page is not None:
                one.record["overlay"] = page_name(len(explained), file)
                save_picture(one.page, out / one.record["overlay"])
            typer.echo(printable(_line(one.record)))
            explained.append(one._replace(page=None, panel=one.panel if len(explained) < _SHEET else None))
    if not explained:
        raise UserError(f"none of {len(left_out)} images can be read; see above, and name others")
    _finish(explained, subject, str(run), chosen, options, out, json_file, left_out)


def _batches(
    files: list[Path], named: set[Path], transform: EvalTransform, size: int, left_out: list[str]
) -> Iterator[list[tuple[Path, Picture]]]:
    """The images, read, so many at a time. A bad one of a folder is told and left out, one that was named is not.

    Raises:
        UserError: an image that was named can't be read.
    """
    from pipeline.explain.pictures import read_picture

    batch: list[tuple[Path, Picture]] = []
    for file in files:
        try:
            batch.append((file, read_picture(file, transform)))
        except UserError as error:
            if file in named:
                raise
            typer.echo(printable(f"left out: {error}"), err=True)
            left_out.append(str(file))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check(method: str | None, sign: int, boxes: Path | None, threshold: float | None) -> None:
    if sign not in (1, -1):
        raise UserError(f"--sign {sign}: choose +1 or -1")
    for option, given in (("--boxes", boxes is not None), ("--threshold", threshold is not None)):
        if given and method not in (None, "cam"):
            raise UserError(f"{option} belongs to --method cam, not to {method}; leave one of them out")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold:g}: a part of the map's range, from 0 to 1")


def _check_fit(method: str, wanted: str | None, sign: int, scores: Scores | None, plain: str | None) -> None:
    """Options that the method has no use for, once it is known."""
    for option, given in (("--sign", sign != 1), ("--scores", scores is not None), ("--plain", plain is not None)):
        if given and method != "gradcat":
            raise UserError(f"{option} belongs to --method gradcat, not to {method}; leave it out")
    if wanted is not None and method not in ("gradcat", "cam"):
        raise UserError(f"--class belongs to --method gradcat and cam; {method} knows no class, leave it out")

    if plain is not None and scores in (Scores.gradient, Scores.channel_weights):
        raise UserError(f"--plain belongs to --scores conductance and occlusion; {scores} puts nothing in its place")


def _rgb(colour: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    mistake = UserError(f"--plain {colour}: no colour; write a name, such as black, or #808080")
    try:
        red, green, blue, *alpha = ImageColor.getrgb(colour)
    except ValueError as error:
        raise mistake from error
    if alpha:
        raise mistake
    return red, green, blue


def _check_json(json_file: Path, out: Path) -> None:
    """Find out now that the figures can't be written."""
    try:
        if json_file.is_dir():
            raise UserError(f"{json_file}: a folder; name a file for --json")
        if json_file.parent != out:
            if not json_file.parent.is_dir():
                raise UserError(f"{json_file}: there is no folder {json_file.parent}; choose another --json")
            check_place(json_file.parent, "--json")
    except OSError as error:
        raise UserError(f"{json_file}: can't be written ({error.strerror}); choose another --json") from error


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """Boxes by name of the image, in its pixels.

    Raises:
        UserError: the file can't be read, or holds something else.
    """
    form = '{"cat.jpg": [[left, top, right, bottom]]}, in pixels of the image'
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); name a JSON file: {form}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); it should hold {form}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: should hold {form}")
    for name, boxes in tree.items():
        if not (isinstance(boxes, list) and boxes and all(_is_box(box) for box in boxes)):
            raise UserError(f"{path}: {name}: should be boxes with left < right and top < bottom, as in {form}")
    return {name: [tuple(map(float, box)) for box in boxes] for name, boxes in tree.items()}  # type: ignore[misc]


def _is_box(box: Any) -> bool:
    if not (isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)):
        return False
    return box[0] < box[2] and box[1] < box[3]


def _subject(run: Path, weights: str | None) -> Subject:
    """The run's model, on the GPU where there is one, and its evaluation transform."""
    import torch

    from pipeline.data.augment.evaluation import EvalTransform
    from pipeline.explain.methods import Subject
    from pipeline.export.source import Preprocessing, load_source
    from pipeline.train.determinism import use_whole_float32

    source = load_source(run, weights)
    typer.echo(f"loaded {source.name} from {source.path}")
    prepare = Preprocessing.of(source)
    transform = EvalTransform(prepare.transform, prepare.img_size, prepare.mean, prepare.std)
    use_whole_float32()
    model = source.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Subject(model, source.name, source.described["classes"], transform)


def _line(record: dict[str, Any]) -> str:
    """What the terminal says of an image."""
    answer = record.get("class", record["predicted"])
    text = f"{record['path']}: {answer['name']} {answer['probability']:.1%}"
    if "steps" in record:
        way = " > ".join(f"{tuple(step['block'])}" for step in record["steps"])
        text += f", blocks {way}, box {_rounded(record['steps'][-1]['original_box'])}"
    if "cam" in record:
        text += f", box {_rounded(record['original_box'])}"
    if "iou" in record:
        text += f", IoU {record['iou']:.3f}"
    if "similarity" in record:
        text += f", similarity {record['similarity'][0]:.3f} after the first layer, {record['similarity'][-1]:.3f} last"
    return text


def _rounded(box: Any) -> str:
    return ",".join(f"{edge:.0f}" for edge in box)


def _finish(
    explained: list[Explained],
    subject: Subject,
    run: str,
    method: str,
    options: Options,
    out: Path,
    json_file: Path,
    left_out: list[str],
) -> None:
    """The contact sheet or the chart, the JSON, and where they are."""
    import numpy as np

    from pipeline.explain.chart import draw_similarity
    from pipeline.explain.draw import contact_sheet
    from pipeline.tracking.files import write_json

    result: dict[str, Any] = {"run": run, "model": subject.name, "img_size": subject.model.img_size, "method": method}
    if method == "gradcat":
        result |= {"scores": options.scores, "sign": options.sign}
        if options.plain is not None:
            result["plain"] = options.plain.tolist()
    ious = [one.record["iou"] for one in explained if "iou" in one.record]
    if ious:
        found = sum(one.record.get("found", False) for one in explained) / len(ious)
        result["localization"] = {"images": len(ious), "mean_iou": sum(ious) / len(ious), "found": found}
        typer.echo(f"{len(ious)} images with boxes: mean IoU {sum(ious) / len(ious):.3f}, found {found:.1%}")
    cells = [(one.lines(), one.panel) for one in explained if one.panel is not None]
    if cells:
        save_picture(contact_sheet(cells, _COLUMNS), out / SHEET_NAME)
        if len(cells) < len(explained):
            typer.echo(f"{out / SHEET_NAME} has the first {len(cells)} of {len(explained)} images")
    else:
        rows = np.array([one.record["similarity"] for one in explained])
        save_chart(partial(draw_similarity, rows, subject.name), out / CHART_NAME)
    result |= {"left_out": left_out, "images": [one.record for one in explained]}
    write_json(json_file, result)
    typer.echo(f"wrote {json_file} and the pictures in {out}")
