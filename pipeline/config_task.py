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


class DiscriminatorConfig(Section):
    """The network that tells generated images from real ones."""

    width: int = Field(256, ge=1, description="channels at the image's size, twice as many at each smaller one")
    max_width: int = Field(512, ge=1, description="channels at most")
    group: int = Field(
        0, ge=0, description="images whose standard deviation it sees, against images that are all alike; 0: none"
    )


class GenerateConfig(Section):
    """Pictures like those of the shards are made from noise; see docs/generate.md."""

    kind: Literal["generate"] = "generate"
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    r1_weight: float = Field(10.0, ge=0, description="of the squared gradient of real images' logits; 0: without it")
    r1_every: int = Field(1, ge=1, description="steps from one penalty to the next, which is as many times as heavy")
    features: Literal["inception", "small"] = Field(
        "inception",
        description="network of FID and Inception score; inception: that of published figures, its weights are "
        "fetched; small: one that learns the classes of data.train within seconds",
    )
    samples: int = Field(50_000, ge=20, description="images that an evaluation generates")


TaskConfig = Annotated[
    ClassifyConfig | LanguageConfig | GenerateConfig, Field(discriminator="kind"), BeforeValidator(kind_alone)
]
