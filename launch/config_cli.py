"""`rookery config`: look at the config tree without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def config(
    recipe: Annotated[Path | None, typer.Argument(help="recipe to print, bases and overrides applied")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    schema: Annotated[bool, typer.Option(help="print the JSON Schema of all keys, for editors")] = False,
) -> None:
    """Print a recipe as it would run, or the JSON Schema of every key."""
    from pipeline.config import RunConfig
    from pipeline.config_load import dump_config, load_config

    if schema or recipe is None:
        typer.echo(json.dumps(RunConfig.model_json_schema(), indent=1))
    else:
        typer.echo(dump_config(load_config(recipe, overrides or [])), nl=False)
