"""`rookery explain`: files, figures, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from launch.cli import app
from pipeline.data.augment.evaluation import EvalTransform
from pipeline.data.augment.transforms import build_eval_transform
from pipeline.explain.conductance import conduct_tree
from pipeline.explain.gradcat import Tree, check_tree, descend, grow_tree
from pipeline.explain.names import Scores
from pipeline.explain.occlusion import occlude_tree
from pipeline.explain.pictures import read_picture
from pipeline.models.nest import Nest
from pipeline.train.trained import Trained
from tests.conftest import small_disk

Explain = Callable[..., tuple[int, str, str]]

TREES: dict[Scores, Callable[[Nest, Tensor, Tensor, int], Tree]] = {
    Scores.conductance: conduct_tree,
    Scores.occlusion: occlude_tree,
    Scores.gradient: grow_tree,
    Scores.channel_weights: lambda *arguments: grow_tree(*arguments, channel_weights=True),
}


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Explain:
    """The command: arguments -> exit status, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rookery", "explain", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            app()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def nest(models: Path) -> tuple[Nest, EvalTransform]:
    """The exported NesT and how it takes its pictures."""
    trained = Trained.from_export(models / "nest")
    transform = build_eval_transform(trained.transform, trained.augment, trained.img_size, trained.in_chans)
    return check_tree(trained.model.eval()), transform  # type: ignore[arg-type]


def renamed(model: Path, copy: Path, names: dict[int, str]) -> None:
    """A copy of an exported model, with other names for some of its classes."""
    shutil.copytree(model, copy)
    described = json.loads((copy / "config.json").read_text())
    for number, name in names.items():
        described["classes"][number] = name
    (copy / "config.json").write_text(json.dumps(described))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "explain.json").read_text())


@pytest.mark.parametrize("scores", Scores)
def test_gradcat(scores: Scores, models: Path, pictures: Path, explain: Explain, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    status, printed, err = explain(
        models / "nest", pictures, "--out", out, "--class", "cat", "--sign", "-1", "--scores", scores
    )
    assert status == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["0000_a.png", "0001_b.png", "contact_sheet.png", "explain.json"]
    assert f"{pictures / 'a.jpg'}: cat " in printed
    told = result(out)
    assert (told["method"], told["scores"], told["sign"], told["model"]) == ("gradcat", scores, -1, "nest_tiny")
    model, transform = nest(models)
    for record in told["images"]:
        picture = read_picture(Path(record["path"]), transform)
        tree = TREES[scores](model, picture.pixels[None], torch.tensor([2]), -1)
        path = descend(tree)
        assert record["class"]["name"] == "cat" and record["class"]["index"] == 2
        assert record["class"]["logit"] == pytest.approx(float(tree.logits[0, 2]), rel=1e-4, abs=1e-6)
        assert record["predicted"]["index"] == int(tree.logits.argmax())
        assert [step["level"] for step in record["steps"]] == [3, 2]
        assert [step["block"] for step in record["steps"]] == path.blocks[0].tolist()
        # One gradient is exact to its last digits; the others are differences of logits.
        accuracy = 1e-9 if scores in ("gradient", "channel-weights") else 1e-5
        for step, four in zip(record["steps"], path.scores[0], strict=True):
            assert step["scores"] == pytest.approx(four.tolist(), rel=1e-3, abs=accuracy)
            assert step["child"] == int(np.argmax(step["scores"]))
        outer, leaf = (step["box"] for step in record["steps"])
        side = model.img_size / 4
        row, column = record["steps"][1]["block"]
        assert leaf == pytest.approx([column * side, row * side, (column + 1) * side, (row + 1) * side])
        assert outer[0] <= leaf[0] < leaf[2] <= outer[2] and outer[1] <= leaf[1] < leaf[3] <= outer[3]
        with Image.open(out / record["overlay"]) as drawn:
            assert drawn.width > 3 * 288 and drawn.height > 288


def test_the_default(models: Path, pictures: Path, explain: Explain, tmp_path: Path) -> None:
    """Conductance of the predicted class, at +: children add up to their parent."""
    status, _, err = explain(models / "nest", pictures, "--out", tmp_path)
    assert status == 0, err
    told = result(tmp_path)
    assert (told["scores"], told["sign"]) == ("conductance", 1)
    model, transform = nest(models)
    images = torch.stack([read_picture(pictures / name, transform).pixels for name in ("a.jpg", "b.png")])
    tree = conduct_tree(model, images)
    for i, record in enumerate(told["images"]):
        root, below = record["steps"]
        assert record["class"] == record["predicted"]
        assert root["scores"] == pytest.approx(tree.scores[0][i].flatten().tolist(), rel=1e-3, abs=1e-5)
        assert sum(below["scores"]) == pytest.approx(root["scores"][root["child"]], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("scores", ["conductance", "occlusion"])
def test_the_plain_colour(scores: str, models: Path, pictures: Path, explain: Explain, tmp_path: Path) -> None:
    """Given as pixels, used as the model sees them."""
    status, _, err = explain(
        models / "nest", pictures / "a.jpg", "--out", tmp_path, "--plain", "#ff8000", "--scores", scores
    )
    assert status == 0, err
    told = result(tmp_path)
    model, transform = nest(models)
    plain = transform.colour((255, 128, 0))
    orange = transform(Image.new("RGB", (300, 300), (255, 128, 0)))
    assert torch.allclose(plain[:, None, None].expand_as(orange), orange, atol=1e-5)
    assert told["plain"] == pytest.approx(plain.tolist())
    image = read_picture(pictures / "a.jpg", transform).pixels[None]
    tree, usual = (TREES[Scores(scores)](model, image, None, 1, colour) for colour in (plain, None))
    found = told["images"][0]["steps"][0]["scores"]
    assert found == pytest.approx(tree.scores[0][0].flatten().tolist(), rel=1e-3, abs=1e-5)
    assert found != pytest.approx(usual.scores[0][0].flatten().tolist(), rel=1e-2)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_a_class_is_found_in_either_unicode_form(
    forms: tuple[str, str], models: Path, pictures: Path, explain: Explain, tmp_path: Path
) -> None:
    written, asked = (unicodedata.normalize(form, "caf\N{LATIN SMALL LETTER E WITH ACUTE}") for form in forms)
    renamed(models / "nest", tmp_path / "nest", {3: written})
    status, _, err = explain(tmp_path / "nest", pictures / "a.jpg", "--out", tmp_path, "--class", asked)
    assert (status, err) == (0, "")
    assert result(tmp_path)["images"][0]["class"]["index"] == 3


@pytest.mark.parametrize(
    ("asked", "index", "note"),
    [
        ("2", 5, "--class 2: the class called 2 is explained (number 5); class number 2 is cat\n"),
        ("02", 2, ""),
        ("3", 3, ""),
        ("30", 4, ""),
    ],
)
def test_a_name_that_is_also_a_number_is_told(
    asked: str, index: int, note: str, models: Path, pictures: Path, explain: Explain, tmp_path: Path
) -> None:
    renamed(models / "nest", tmp_path / "nest", {3: "3", 4: "30", 5: "2"})
    status, _, err = explain(tmp_path / "nest", pictures / "a.jpg", "--out", tmp_path, "--class", asked)
    assert (status, err) == (0, note)
    assert result(tmp_path)["images"][0]["class"]["index"] == index


def test_bad_images_of_a_folder_are_left_out(models: Path, pictures: Path, explain: Explain, tmp_path: Path) -> None:
    """One that was named is a mistake, and what was there before stays."""
    folder, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(pictures, folder)
    (folder / "ab.jpg").write_bytes(b"no image")
    status, _, err = explain(models / "nest", folder, "--out", out, "--batch-size", "1")
    assert status == 0 and err.startswith(f"left out: {folder / 'ab.jpg'}: can't be read as an image")
    told = result(out)
    assert told["left_out"] == [str(folder / "ab.jpg")]
    assert [Path(image["path"]).name for image in told["images"]] == ["a.jpg", "b.png"]
    assert [image["overlay"] for image in told["images"]] == ["0000_a.png", "0001_b.png"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, _, err = explain(models / "nest", folder / "ab.jpg", folder / "a.jpg", "--out", out)
    assert status == 2 and "ab.jpg: can't be read as an image" in err
    for name in ("a.jpg", "b.png"):
        (folder / name).unlink()
    status, _, err = explain(models / "nest", folder, "--out", out)
    assert status == 2 and "none of 1 images can be read" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_pages_of_the_call_before_are_gone(models: Path, pictures: Path, explain: Explain, tmp_path: Path) -> None:
    """Others' files stay; pictures get pages whatever they are called."""
    for name in ("x" * 250 + ".jpg"[:5], "two\nlines.jpg", "ünï.jpg", "z\x1b[2J\udcff.jpg"):
        shutil.copy(pictures / "a.jpg", tmp_path / name[-255:])
    out = tmp_path / "out"
    (tmp_path / "bad\n.jpg").write_bytes(b"no image")
    status, told, err = explain(models / "nest", tmp_path, "--out", out)
    assert status == 0 and r"z\x1b[2J\udcff.jpg: " in told and "\x1b" not in told
    assert told.count("\n") == 1 + 4 + 1  # what was loaded, a line for each picture, what was written
    assert err.startswith(rf"left out: {tmp_path}/bad\n.jpg: can't be read as an image")
    pages = sorted(path.name for path in out.glob("0*.png"))
    assert [pages[0], *pages[2:]] == ["0000_two\nlines.png", "0002_z\x1b[2J.png", "0003_ünï.png"]
    for name in ("holiday.png", "0007_mine.png"):
        (out / name).write_bytes(b"")
    assert explain(models / "nest", pictures / "a.jpg", "--out", out)[0] == 0
    left = sorted(path.name for path in out.iterdir())
    assert left == ["0000_a.png", "0007_mine.png", "contact_sheet.png", "explain.json", "holiday.png"]
    assert explain(models / "nest", pictures / "a.jpg", "--out", out, "--method", "similarity")[0] == 0
    left = sorted(path.name for path in out.iterdir())
    assert left == ["0007_mine.png", "explain.json", "holiday.png", "similarity.png"]


def test_pages_of_a_call_without_its_json_are_gone(
    models: Path, pictures: Path, explain: Explain, tmp_path: Path
) -> None:
    """It was killed, or wrote its figures elsewhere."""
    out, elsewhere = tmp_path / "out", tmp_path / "figures.json"
    explain(models / "nest", pictures, "--method", "similarity", "--out", out, "--json", elsewhere)
    explain(models / "nest", pictures, "--out", out)
    shutil.copy(pictures / "b.png", out / "0003_mine.png")  # a picture indeed, and not ours
    (out / "0004_folder.png").mkdir()
    assert explain(models / "nest", pictures / "b.png", "--out", out, "--json", elsewhere)[0] == 0
    # The figures of the call before are gone with its pages.
    left = ["0000_b.png", "0003_mine.png", "0004_folder.png", "contact_sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == left
    assert explain(models / "nest", pictures / "a.jpg", "--out", out, "--json", elsewhere)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000_a.png", *left[1:]]
    (out / "0000_b.png").mkdir()
    status, _, err = explain(models / "nest", pictures / "b.png", "--out", out)
    assert status == 2 and "0000_b.png can't be written: Is a directory" in err


def test_a_picture_of_another_size_than_the_model_takes(
    models: Path, pictures: Path, explain: Explain, tmp_path: Path
) -> None:
    """Of a model that was evaluated without resizing; nothing of its config can be changed any more."""
    shutil.copytree(models / "nest", tmp_path / "nest")
    described = json.loads((tmp_path / "nest" / "config.json").read_text())
    described["eval_transform"]["resize"] = "none"
    (tmp_path / "nest" / "config.json").write_text(json.dumps(described))
    status, _, err = explain(tmp_path / "nest", pictures / "a.jpg", "--out", tmp_path / "out")
    side = nest(models)[1].img_size
    assert status == 2 and f"a.jpg: 60x40 pixels; this model takes pictures of {side}x{side} as they are" in err
    Image.open(pictures / "a.jpg").resize((side, side)).save(tmp_path / "a.png")
    assert explain(tmp_path / "nest", tmp_path / "a.png", "--out", tmp_path / "out")[0] == 0


def test_a_killed_call_leaves_no_pictures_to_the_next(
    models: Path, pictures: Path, explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor figures of the call before it beside its own pictures."""
    others, out = tmp_path / "others", tmp_path / "out"
    others.mkdir()
    for name in ("c.jpg", "d.jpg"):
        shutil.copy(pictures / "a.jpg", others / name)
    assert explain(models / "nest", pictures, "--out", out)[0] == 0

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.explain.draw.contact_sheet", killed)
        assert explain(models / "nest", others, "--out", out)[0] == 130
    assert sorted(path.name for path in out.iterdir()) == ["0000_c.png", "0001_d.png"]
    (out / "0009_mine.png").write_bytes(b"")
    assert explain(models / "nest", pictures / "b.png", "--out", out)[0] == 0
    left = sorted(path.name for path in out.iterdir())
    assert left == ["0000_b.png", "0009_mine.png", "contact_sheet.png", "explain.json"]


def test_a_full_disk_is_told(models: Path, pictures: Path, explain: Explain, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        status, _, err = explain(models / "nest", pictures, "--out", disk)
        assert (status, err.count("\n")) == (2, 1)
        assert f"{disk / '0000_a.png'} can't be written: No space left on device; free space" in err
        assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("model", "arguments", "method", "key", "files"),
    [
        ("hvt", [], "rollout", "rollout", ["0000_a.png", "contact_sheet.png"]),
        ("refiner", [], "rollout", "rollout", ["0000_a.png", "contact_sheet.png"]),
        ("hvt", ["--method", "similarity"], "similarity", "similarity", ["similarity.png"]),
        ("nest", ["--method", "cam"], "cam", "cam", ["0000_a.png", "contact_sheet.png"]),
    ],
)
def test_other_methods(
    model: str, arguments: list[str], method: str, key: str, files: list[str],
    models: Path, pictures: Path, explain: Explain, tmp_path: Path,
) -> None:  # fmt: skip
    status, _, err = explain(models / model, pictures / "a.jpg", "--out", tmp_path, *arguments)
    assert status == 0, err
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".png") == files
    told = result(tmp_path)
    assert told["method"] == method and "sign" not in told
    found = told["images"][0][key]
    if method == "rollout":
        assert list(found) == (["before", "after"] if model == "refiner" else ["before"])
        # The class token draws from itself too; the mean of all tokens draws from patches only.
        total = np.sum(found["before"])
        assert total == pytest.approx(1, abs=1e-5) if model == "hvt" else 0 < total < 1
    assert np.isfinite(np.array(found["before"] if method == "rollout" else found)).all()


def test_boxes(models: Path, pictures: Path, explain: Explain, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text(json.dumps({"a.jpg": [[0, 0, 1, 1], [10, 0, 50, 40]]}))
    arguments = (models / "nest", pictures, "--boxes", tmp_path / "none.json", "--out", tmp_path, "--threshold", 0)
    status, printed, err = explain(*arguments)
    assert status == 0, err
    told = result(tmp_path)
    # At threshold 0 the box is all that the model sees: of 60x40 pixels, after the crop of 0.9, a square in the middle.
    left, top, right, bottom = told["images"][0]["original_box"]
    assert (left + right, top + bottom) == pytest.approx((60, 40), abs=5)
    iou = told["images"][0]["iou"]
    assert 0.7 < iou < 1 and told["images"][0]["found"]
    assert told["localization"] == {"images": 1, "mean_iou": iou, "found": 1.0}
    assert "iou" not in told["images"][1]
    assert f"1 images with boxes: mean IoU {iou:.3f}, found 100.0%" in printed


CASES = {
    "no such run": (["{tmp}/nowhere", "{pictures}"], "nowhere: no model here; name a run directory"),
    "no NesT": (
        ["{models}/hvt", "{pictures}", "--method", "gradcat"],
        "hvt_ti_1: GradCAT walks down the nested blocks of a NesT; this model is a Hvt; choose --method rollout or "
        "similarity",
    ),
    "no roll-out": (
        ["{models}/nest", "{pictures}", "--method", "rollout"],
        "choose --method gradcat or cam or similarity",
    ),
    "class": (
        ["{models}/nest", "{pictures}", "--class", "dig"],
        "--class dig: the model has no such class; did you mean dog",
    ),
    "number": (["{models}/nest", "{pictures}", "--class", "7"], "--class 7: the model has 7 classes, 0 to 6"),
    "sign": (["{models}/nest", "{pictures}", "--sign", "2"], "--sign 2: choose +1 or -1"),
    "sign elsewhere": (
        ["{models}/nest", "{pictures}", "--sign", "-1", "--method", "cam"],
        "--sign belongs to --method",
    ),
    "sign of none": (
        ["{models}/hvt", "{pictures}", "--sign", "-1"],
        "--sign belongs to --method gradcat, not to rollout",
    ),
    "scores of none": (["{models}/hvt", "{pictures}", "--scores", "gradient"], "--scores belongs to --method gradcat"),
    "default scores of none": (
        ["{models}/nest", "{pictures}", "--scores", "conductance", "--method", "cam"],
        "--scores belongs to --method gradcat, not to cam",
    ),
    "no such scores": (
        ["{models}/nest", "{pictures}", "--scores", "weights"],
        "'conductance', 'occlusion', 'gradient', 'channel-weights'.",
    ),
    "plain of none": (["{models}/hvt", "{pictures}", "--plain", "black"], "--plain belongs to --method gradcat"),
    "plain of a gradient": (
        ["{models}/nest", "{pictures}", "--plain", "black", "--scores", "gradient"],
        "--plain belongs to --scores conductance and occlusion; gradient puts nothing",
    ),
    "no colour": (["{models}/nest", "{pictures}", "--plain", "bläck"], "--plain bläck: no colour; write a name"),
    "clear colour": (["{models}/nest", "{pictures}", "--plain", "#80808080"], "--plain #80808080: no colour"),
    "class of none": (["{models}/hvt", "{pictures}", "--class", "cat"], "rollout knows no class"),
    "no such image": (["{models}/nest", "{tmp}/x.jpg"], "x.jpg: no such image"),
    "no image": (
        ["{models}/nest", "{models}/nest/config.json"],
        "config.json: can't be read as an image (not an image",
    ),
    "empty folder": (["{models}/nest", "{tmp}/empty"], "empty: no images in this folder"),
    "out is a file": (["{models}/nest", "{pictures}", "--out", "{pictures}/a.jpg"], "a.jpg: not a folder"),
    "out below a file": (["{models}/nest", "{pictures}", "--out", "{pictures}/a.jpg/b"], "can't be written"),
    "json": (["{models}/nest", "{pictures}", "--json", "{tmp}/no/x.json"], "there is no folder"),
    "boxes and rollout": (
        ["{models}/hvt", "{pictures}", "--boxes", "{tmp}/b.json", "--method", "rollout"],
        "--boxes belongs to --method cam, not to rollout",
    ),
    "boxes of a token model": (["{models}/hvt", "{pictures}", "--boxes", "{tmp}/b.json"], "CAM needs logits"),
    "no boxes file": (["{models}/nest", "{pictures}", "--boxes", "{tmp}/c.json"], "c.json: can't be read"),
    "bad boxes": (
        ["{models}/nest", "{pictures}", "--boxes", "{tmp}/bad.json"],
        "a.jpg: should be boxes with left < right",
    ),
    "other boxes": (
        ["{models}/nest", "{pictures}", "--boxes", "{tmp}/other.json"],
        "has boxes of none of these images",
    ),
    "one name twice": (
        ["{models}/nest", "{pictures}", "{pictures}/a.jpg", "--boxes", "{tmp}/b.json"],
        "there are several images called a.jpg",
    ),
    "deep boxes": (["{models}/nest", "{pictures}", "--boxes", "{tmp}/deep.json"], "deep.json: is not JSON"),
    "out below a broken link": (["{models}/nest", "{pictures}", "--out", "{tmp}/link/x"], "link is no folder"),
    "out of the kernel": (
        ["{models}/nest", "{pictures}", "--out", "/proc/x"],
        "/proc/x: can't be written (/proc is not yours)",
    ),
    "long out": (["{models}/nest", "{pictures}", "--out", "{tmp}/" + 300 * "x"], "too long); choose another --out"),
    "long json": (["{models}/nest", "{pictures}", "--json", 300 * "x"], "can't be written (File name too long)"),
    "weights of what is no run": (
        ["{models}/nest", "{pictures}", "--weights", "best"],
        "with --weights best; leave it",
    ),
    "threshold": (["{models}/nest", "{pictures}", "--threshold", "2"], "--threshold 2: a part of the map's range"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_explained(
    case: str, models: Path, pictures: Path, explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, expected = CASES[case]
    (tmp_path / "empty").mkdir()
    for name, boxes in (("b", [[0, 0, 9, 9]]), ("bad", [[9, 0, 0, 9]])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"a.jpg": boxes}))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other.json").write_text(json.dumps({"z.jpg": [[0, 0, 9, 9]]}))
    monkeypatch.chdir(tmp_path)
    status, _, err = explain(*(a.format(models=models, pictures=pictures, tmp=tmp_path) for a in arguments))
    assert status == 2
    assert expected in err
    assert not list(tmp_path.rglob("*.png"))
