"""What a run is about: the `task` section, of one kind or another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.config_section import Section, kind_alone


class ClassifyConfig(Section):
    """Pictures are told apart by class."""

    kind: Literal["classify"] = "classify"


class LanguageConfig(Section):
    """Sentences are told apart, or rated, by a BERT encoder; see docs/language.md."""

    kind: Literal["language"] = "language"
    name: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "polarity"] = Field(
        "polarity", description="a task of GLUE; polarity: made sentences, for tests and demos"
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="folder with tokenizer.json, or a name on Hugging Face's hub; null: the words of data.train",
    )
    vocab_size: int = Field(30522, ge=5, description="tokenizer=null: most words, the most frequent ones")
    max_length: int = Field(128, ge=3, description="tokens that are kept of a sample, special ones counted")


TaskConfig = Annotated[ClassifyConfig | LanguageConfig, Field(discriminator="kind"), BeforeValidator(kind_alone)]
