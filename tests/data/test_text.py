"""Sentences: reading, tokens, and batches that are the same whoever computes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.order import DataOrder
from pipeline.data.text.batches import EvalBatches, TextBatch, step_batches
from pipeline.data.text.glue import TASKS
from pipeline.data.text.made import made_rows
from pipeline.data.text.rows import Rows, read_rows
from pipeline.data.text.tokens import TokenSplit, load_tokenizer, tokenize, words_tokenizer
from pipeline.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `datasets` makes of files goes to a folder of the test's."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


PAIRS = [
    {"sentence1": "A dog runs.", "sentence2": "An animal moves.", "label": 0, "idx": 0},
    {"sentence1": "It rains.", "sentence2": "The sun shines", "label": 1, "idx": 1},
    {"sentence1": "Two men, talking", "sentence2": "Two people talk", "label": 0, "idx": 2},
]
WANTED = Rows([[p["sentence1"] for p in PAIRS], [p["sentence2"] for p in PAIRS]], [0, 1, 0])  # type: ignore[misc]


def write(folder: Path, kind: str) -> str:
    import datasets

    table = datasets.Dataset.from_list(PAIRS)
    path = folder / f"validation.{kind}"
    if kind == "json":
        path.write_text(json.dumps(PAIRS))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, PAIRS)))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": table.select([0]), "validation": table}).save_to_disk(path)
    elif kind == "names":
        path = folder / "validation.jsonl"
        names = [{**pair, "label": TASKS["rte"].classes[int(str(pair["label"]))]} for pair in PAIRS]
        path.write_text("\n".join(map(json.dumps, names)))
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv", "tsv", "saved", "splits", "names"])
def test_the_same_rows_from_any_file(kind: str, tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, kind), "rte", TASKS["rte"], "validation") == WANTED


def test_a_folder_holds_a_file_for_each_split(tmp_path: Path) -> None:
    write(tmp_path, "jsonl")
    assert read_rows(str(tmp_path), "rte", TASKS["rte"], "validation") == WANTED
    with pytest.raises(UserError, match=r"no file train\.\(json"):
        read_rows(str(tmp_path), "rte", TASKS["rte"], "train")
    with pytest.raises(UserError, match=r"validation.cvs: no file .* there: no such file or folder; check the path"):
        read_rows(str(tmp_path / "validation.cvs"), "rte", TASKS["rte"], "validation")
    (tmp_path / "validation.txt").touch()
    with pytest.raises(UserError, match=r"validation.txt: a file of another kind; name one of .json, .*, .tsv$"):
        read_rows(str(tmp_path / "validation.txt"), "rte", TASKS["rte"], "validation")


@pytest.mark.parametrize(
    ("name", "rows", "told"),
    [
        ("cola", PAIRS, "needs the columns sentence, label; sentence is not among"),
        ("rte", [{**PAIRS[0], "label": -1}], "row 0 has the label -1 .*hidden.*0 or entailment"),
        ("rte", [{**PAIRS[0], "label": "maybe"}], "label 'maybe'"),
        ("stsb", [{**PAIRS[0], "label": "high"}], "a label that is no number"),
        ("stsb", [PAIRS[0], {**PAIRS[0], "label": "high"}], "row 1 has 'high', a label that is no number; write one"),
        ("stsb", [PAIRS[0], {**PAIRS[0], "label": math.inf}], "row 1 has inf, a label that is no number"),
        ("stsb", [PAIRS[0], {**PAIRS[0], "label": math.nan}], "row 1 has nan, a label that is no number"),
        ("stsb", [PAIRS[0], {**PAIRS[0], "label": None}], "row 1 has no label; write one"),
        ("stsb", [PAIRS[0], {**PAIRS[0], "label": 10**400}], "row 1 has 10*, a label that is no number"),
    ],
)
def test_what_does_not_fit_is_told(name: str, rows: list[Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=told):
        read_rows(str(path), name, TASKS[name], "validation")


NAMED = b"sentence,label\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "rows.csv",
            b"text,class\na,1\n",
            "sentence is not among text, class; name its columns so .a .csv or .tsv in its first",
        ),
        ("rows.csv", NAMED + b"a,1\nb,\n", "row 1 has the label None; there are 0 or negative"),
        ("rows.csv", NAMED + b"a,1\nb,0.0\nc,maybe\nd,7\n", "row 2 has the label 'maybe'; there are 0 or negative"),
        ("rows.csv", NAMED + b"a,1\nb,-1\nc,negative\n", r"row 1 has the label '-1' \(the labels of GLUE"),
        ("rows.csv", NAMED + b"a,1\n" * 10_001 + b"b,maybe\n", "row 10001 has the label 'maybe'"),
        (
            "rows.json",
            b'[{"sentence": "a", "label": "1"}, {"sentence": "a", "label": true}]',
            "row 1 has the label True",
        ),
        ("rows.json", b'[{"sentence": "a", "label": "1"}, {"sentence": "a", "label": 0.5}]', "row 1 has the label 0.5"),
        ("rows.csv", NAMED + b"a,1\n,0\n", "row 1 has no sentence; write its text, or take the row out"),
        ("rows.csv", NAMED + b'a,1\n"  ",0\n', "row 1 has no sentence"),
        ("rows.tsv", b"sentence\tlabel\n\t0\n", "row 0 has no sentence"),
        ("rows.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence": null, "label": 0}', "row 1 has no sentence"),
        ("rows.jsonl", b'{"sentence": "a", "label": 1}\n{"label": 0}', "row 1 has no sentence"),
        ("rows.jsonl", b'{"sentence": "", "label": 1}', "row 0 has no sentence"),
        ("rows.jsonl", b'{"sentence": 3, "label": 1}', "row 0 has the sentence 3, which is no text; put quotes"),
        ("rows.json", b'[{"sentence": "a", "label": 1}, {"sentence": 4, "label": 1}]', "row 1 has the sentence 4,"),
        ("rows.json", b'[{"sentence": "a", "label": [1]}]', r"row 0 has the label \[1\]"),
        ("rows.csv", b"", "the file is empty; write the rows"),
        ("rows.jsonl", b"\n", "the file is empty; write the rows"),
        ("rows.parquet", b"", "the file is empty; write it again"),
        ("rows.csv", NAMED, "no rows below the names of the columns; write some"),
        ("rows.json", b"[]", "no rows in it; write some"),
        ("rows.csv", NAMED + b"caf\xe9,1\n", r"line 2 is not UTF-8 \(byte 0xe9\); save the file as UTF-8, .*iconv"),
        (
            "rows.csv",
            "\ufeffsentence,label\na,1\n".encode("utf-16-le"),
            "is UTF-16, not UTF-8; save .*iconv -f UTF-16 -t",
        ),
        ("rows.jsonl", "\ufeff{}".encode("utf-16-be"), "is UTF-16, not UTF-8; .* rows.jsonl > utf8.jsonl"),
        ("rows.jsonl", b'{"sentence": "caf\xe9", "label": 1}', "line 1 is not UTF-8"),
        (
            "rows.jsonl",
            b'{"sentence": "a", "label": 1}\n{"sentence": "b", lab',
            "line 2, column 19 is not JSON: .*me",
        ),
        ("rows.json", b'[{"sentence": "a", "label": 1},\n', "line 2, column 1 is not JSON"),
        (
            "rows.jsonl",
            b'{"sentence": "a", "label": 1}\n\n3',
            'line 3 is no JSON object; write each row as ."sentence"',
        ),
        ("rows.csv", NAMED + b'7,"a, b",1\n8,b,0\n', "the first row has 3 cells for 2 columns; name all of them"),
        ("rows.csv", NAMED + b'"' + b"a,1\n" * 50_000, "can't be read as csv"),
        ("rows.tsv", b'sentence\tlabel\n"1"\ta\t1\n', "the first row has 3 cells for 2 columns"),
        ("rows.csv", NAMED + b"a,1\nb,c,d,0\n", "can't be read as csv: .*line 3, saw 4; .*quotes around"),
        (
            "rows.tsv",
            b'sentence\tlabel\na\t1\n"a\tb"\t1\n',
            "as tsv: .*line 3, saw 3; .*none can hold a tab .*quotes don't",
        ),
        ("rows.parquet", b"no", "can't be read as parquet: .*; it is damaged or of another kind: write it again"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(
    name: str, content: bytes, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_rows(str(path), "sst2", TASKS["sst2"], "train")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert capfd.readouterr() == ("", ""), "the libraries say nothing beside it"


def test_words_of_a_csv_that_stand_for_nothing_elsewhere_are_sentences(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffsentence,label\nNA,1\nnull,0\n1.0,1\n", "utf-8")
    assert read_rows(str(path), "sst2", TASKS["sst2"], "train") == Rows([["NA", "null", "1.0"]], [1, 0, 1])


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ("4.2\n\n1", "row 1 has no label"),
        ("4.2\nNaN\n1", "row 1 has no label"),
        ("4.2\n-inf\nx", "row 1 has '-inf'"),
        ("4.2\n1e999\n1", "row 1 has '1e999', a label that is no number"),
    ],
)
def test_a_number_that_a_csv_lacks_is_told_with_its_row(cells: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sentence1,sentence2,label\n" + "".join(f"a,b,{cell}\n" for cell in cells.split("\n")))
    with pytest.raises(UserError, match=f"rows.csv: {told}"):
        read_rows(str(path), "stsb", TASKS["stsb"], "train")
    path.write_text("sentence1,sentence2,label\na,b,4.2\na,b,3\n")
    assert read_rows(str(path), "stsb", TASKS["stsb"], "train").labels == [4.2, 3.0]


@pytest.mark.parametrize("labels", ["1\n0\n1", "positive\n0\n1", "1\nnegative\n1.0", "positive\nnegative\n 1"])
def test_numbers_and_names_of_classes_may_stand_side_by_side(labels: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sentence,label\n" + "".join(f"a,{label}\n" for label in labels.split("\n")))
    assert read_rows(str(path), "sst2", TASKS["sst2"], "train").labels == [1, 0, 1]


def test_a_quote_in_a_tsv_is_a_letter_as_in_glue(tmp_path: Path) -> None:
    path, sentences = tmp_path / "rows.tsv", ['"He left', "a", 'six" wide', '"b"', "c"]
    path.write_text("sentence\tlabel\n" + "".join(f"{sentence}\t1\n" for sentence in sentences))
    assert read_rows(str(path), "sst2", TASKS["sst2"], "train") == Rows([sentences], [1] * 5)


@pytest.mark.parametrize("missing", ["", None])
def test_a_published_set_may_have_an_empty_sentence_but_none_that_is_missing(missing: Any, tmp_path: Path) -> None:
    import datasets

    pairs = [{"question1": "Why?", "question2": missing, "label": 0}, {"question1": "a", "question2": "b", "label": 1}]
    datasets.Dataset.from_list(pairs).save_to_disk(tmp_path / "saved")
    if missing is None:
        with pytest.raises(UserError, match="row 0 has no question2"):
            read_rows(str(tmp_path / "saved"), "qqp", TASKS["qqp"], "train")
    else:
        rows = read_rows(str(tmp_path / "saved"), "qqp", TASKS["qqp"], "train")
        assert rows == Rows([["Why?", "a"], ["", "b"]], [0, 1])


@pytest.mark.parametrize("address", ["made:", "made:0", "made:x", "made:5@-1", "made:5@x"])
def test_a_bad_made_address_is_told(address: str) -> None:
    with pytest.raises(UserError, match="write made:COUNT"):
        read_rows(address, "polarity", TASKS["polarity"], "train")


def test_made_sentences_mean_what_their_labels_say() -> None:
    sentences, labels = made_rows("made:500")
    for sentence, label in zip(sentences, labels, strict=True):
        total, sign = 0, 1
        for word in sentence.split():
            if word == "not":
                sign = -1
            else:
                total, sign = total + sign * (1 if int(word[1:]) % 2 == 0 else -1), 1
        assert label == (total > 0)
    assert 0.4 < np.mean(labels) < 0.6
    assert len({len(sentence.split()) for sentence in sentences}) > 5
    assert made_rows("made:100") == (sentences[:100], labels[:100]) != made_rows("made:100@1")


def test_tokens_of_words() -> None:
    tokenizer = words_tokenizer([["The dog sees the cat", "a dog!"]], 8)
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "dog": 4, "the": 5, "!": 6, "a": 7}
    encoded = tokenizer.encode("THE dog", "a bird")
    assert encoded.ids == [2, 5, 4, 3, 7, 1, 3] and encoded.type_ids == [0, 0, 0, 0, 1, 1, 1]


def made_split(count: int, cache: Path, max_length: int = 32) -> TokenSplit:
    rows = read_rows(f"made:{count}", "polarity", TASKS["polarity"], "train")
    return tokenize(rows, "train", words_tokenizer(rows.sentences, 100), max_length, cache)


def test_tokens_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.data.text.tokens._MANY", 50)
    made_split(49, tmp_path / "few")
    assert capsys.readouterr().err == ""
    first = made_split(50, tmp_path)
    assert capsys.readouterr().err == f"train: making tokens of 50 samples, once; kept in {tmp_path}\n"
    [file] = tmp_path.glob("*.npz")
    before = file.stat().st_mtime_ns
    again = made_split(50, tmp_path)
    assert capsys.readouterr().err == ""
    assert file.stat().st_mtime_ns == before
    assert first.manifest(TASKS["polarity"]).fingerprint() == again.manifest(TASKS["polarity"]).fingerprint()
    file.write_bytes(b"damaged")
    assert np.array_equal(made_split(50, tmp_path).ids, first.ids)
    shorter = made_split(50, tmp_path, max_length=8)
    assert shorter.lengths.max() == 8 and len(list(tmp_path.glob("*.npz"))) == 2
    assert shorter.manifest(TASKS["polarity"]).fingerprint() != first.manifest(TASKS["polarity"]).fingerprint()


def test_a_tokenizer_is_read_back(tmp_path: Path) -> None:
    tokenizer = words_tokenizer([["one two"]], 100)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert load_tokenizer(str(tmp_path)).encode("two three").ids == tokenizer.encode("two three").ids
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"task\.tokenizer=.*no tokenizer there: .*json is damaged \(.*write or fetch"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("missing/folder/deep", "no such folder or file; name a folder with tokenizer.json, that file, or OWNER/NAME"),
        ("./missing", "no such folder or file"),
        ("/missing", "no such folder or file"),
        ("empty", "no tokenizer there: the folder has no tokenizer.json; save the tokenizer into it"),
        (
            "nobody/nothing",
            "no tokenizer there: .*; no folder here has this name either: name one .*, or check the name",
        ),
    ],
)
def test_a_tokenizer_that_is_not_there_is_told(
    source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(UserError, match=f"task.tokenizer={source}: {told}") as caught:
        load_tokenizer(source)
    assert "\n" not in str(caught.value) and "Repo id" not in str(caught.value)


def by_sample(batches: list[TextBatch]) -> dict[int, tuple[list[int], int]]:
    """Tokens without the padding, and label, of each sample that counts."""
    rows = [zip(b.samples.tolist(), b.ids, b.tokens, b.labels.tolist(), b.real, strict=True) for b in batches]
    return {s: (ids[tokens].tolist(), y) for of_batch in rows for s, ids, tokens, y, real in of_batch if real}


def test_a_step_has_the_same_samples_and_padding_on_any_number_of_processes(tmp_path: Path) -> None:
    split = made_split(203, tmp_path)
    order = DataOrder((203,), seed=3, batch=8, lanes=4, shuffle="full")
    steps = range(5, 45)
    alone = list(step_batches(split, order, steps, 0, 1))
    for world in (2, 4):
        parts = [list(step_batches(split, order, steps, rank, world)) for rank in range(world)]
        for step, (whole, *its) in zip(steps, zip(alone, *parts, strict=True), strict=True):
            assert {batch.ids.shape[1] for batch in its} == {whole.ids.shape[1]}
            assert by_sample(its) == by_sample([whole])
            for rank, batch in enumerate(its):
                assert batch.samples.tolist() == order.step(step, rank, world).samples.tolist()
    assert len({batch.ids.shape[1] for batch in alone}) > 1
    sample = int(alone[0].samples[3])
    assert (
        alone[0].ids[3][alone[0].tokens[3]].tolist()
        == split.ids[split.starts[sample] :][: split.lengths[sample]].tolist()
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_has_every_sample_once(world: int, tmp_path: Path) -> None:
    split = made_split(50, tmp_path)
    per_rank = [list(EvalBatches(split, 8, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in per_rank}) == 1
    samples = torch.cat([batch.samples[batch.real] for batches in per_rank for batch in batches])
    assert sorted(samples.tolist()) == list(range(50))
    assert all(len(batch.ids) == 8 for batches in per_rank for batch in batches)
