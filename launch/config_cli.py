"""`rookery config`: look at a recipe, or at every key there is, without running anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def config(
    recipe: Annotated[Path | None, typer.Argument(help="recipe to print, bases and overrides applied")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema of recipes, for editors")] = False,
) -> None:
    """Print a recipe as it would run; without one, every key with its default and meaning.

    The model is built, without memory for its weights, so that a name or option it doesn't know is told here too; the
    data are not looked at. Exit status: 0, or 2 for a mistake in the recipe.
    """
    from pipeline.config_load import dump_config, load_config, placing
    from pipeline.config_schema import describe_keys, file_schema

    if schema:
        typer.echo(json.dumps(file_schema(), indent=1))
    elif recipe is not None:
        # torch takes seconds to import; a list of the keys need not wait for it.
        from pipeline.tracking.redact import redact
        from pipeline.train.tasks import make_task

        resolved = load_config(recipe, overrides or [])
        with placing(recipe, overrides or []):
            make_task(resolved).build_model("meta")
        typer.echo(redact(dump_config(resolved)), nl=False)
    else:
        for key, default, about, is_section in describe_keys():
            typer.echo(f"\n{key}  {default}  {about}" if is_section else f"  {key:<36} {default:<14} {about}")
