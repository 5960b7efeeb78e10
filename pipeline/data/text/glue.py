"""The tasks of GLUE: columns, classes, what is measured, and which split is evaluated.

Wang et al., 2018, arXiv 1804.07461. Classes are in the order of the labels on the hub (`nyu-mll/glue`). As BERT's
authors did, F1 is reported for QQP and MRPC, Spearman's correlation for STS-B, Matthews' for CoLA, accuracy elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextTask:
    """What the samples are and how an answer is judged.

    Attributes:
        columns: of the one or two sentences.
        classes: names of the labels; empty: the label is a number.
        figure: the evaluation's figure that judges: accuracy, f1, matthews or spearman.
        split: the one of the hub's that is evaluated.
        named: whether gluebenchmark.com takes classes by their names, rather than by their numbers.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    figure: str = "accuracy"
    split: str = "validation"
    named: bool = False

    @property
    def outputs(self) -> int:
        """Of the model's head."""
        return len(self.classes) or 1

    @property
    def figures(self) -> tuple[str, ...]:
        """All that an evaluation measures, the figure that judges first."""
        more = {"accuracy": (), "spearman": ("pearson",)}.get(self.figure, ("accuracy",))
        return (self.figure, *more, "loss")

    def submitted(self, answer: float) -> str | int | float:
        """A class's number, or a number itself, as gluebenchmark.com takes it."""
        if not self.classes:
            return min(max(answer, _LOWEST), _HIGHEST)
        return self.classes[int(answer)] if self.named else int(answer)


# STS-B's scale; an answer outside of it is refused there.
_LOWEST, _HIGHEST = 0.0, 5.0
_ENTAILED = ("entailment", "not_entailment")

TASKS = {
    "cola": TextTask(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "sst2": TextTask(("sentence",), ("negative", "positive")),
    "mrpc": TextTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    "stsb": TextTask(("sentence1", "sentence2"), (), "spearman"),
    "qqp": TextTask(("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "mnli": TextTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), split="validation_matched", named=True
    ),
    "qnli": TextTask(("question", "sentence"), _ENTAILED, named=True),
    "rte": TextTask(("sentence1", "sentence2"), _ENTAILED, named=True),
    "wnli": TextTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
    # Not of GLUE: sentences that are made, see `made`.
    "polarity": TextTask(("sentence",), ("negative", "positive")),
}
GLUE = TASKS.keys() - {"polarity"}
