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
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    figure: str = "accuracy"
    split: str = "validation"

    @property
    def outputs(self) -> int:
        """Of the model's head."""
        return len(self.classes) or 1

    @property
    def figures(self) -> tuple[str, ...]:
        """All that an evaluation measures, the figure that judges first."""
        more = {"accuracy": (), "spearman": ("pearson",)}.get(self.figure, ("accuracy",))
        return (self.figure, *more, "loss")


_ENTAILED = ("entailment", "not_entailment")

TASKS = {
    "cola": TextTask(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "sst2": TextTask(("sentence",), ("negative", "positive")),
    "mrpc": TextTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1"),
    "stsb": TextTask(("sentence1", "sentence2"), (), "spearman"),
    "qqp": TextTask(("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "mnli": TextTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), split="validation_matched"),
    "qnli": TextTask(("question", "sentence"), _ENTAILED),
    "rte": TextTask(("sentence1", "sentence2"), _ENTAILED),
    "wnli": TextTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
    # Not of GLUE: sentences that are made, see `made`.
    "polarity": TextTask(("sentence",), ("negative", "positive")),
}
