"""What a run is about: the `task` section, of one kind or another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from pipeline.config_section import Section, kind_alone


class ClassifyConfig(Section):
    """Pictures are told apart by class."""

    kind: Literal["classify"] = "classify"


TaskConfig = Annotated[ClassifyConfig, BeforeValidator(kind_alone)]
