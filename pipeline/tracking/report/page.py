"""Puts the page together."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

from pipeline.tracking.record import RunSummary
from pipeline.tracking.report.data import page_data
from pipeline.wording import counted

# In the order in which they need each other.
_SCRIPTS = ("base.js", "axis.js", "plot.js", "curves.js", "pareto.js", "parallel.js", "tables.js", "main.js")


def render(runs: Sequence[RunSummary], metric: str, price: float | None, left_out: Sequence[str] = ()) -> str:
    """The page for these runs; see `page_data` for the arguments."""
    scripts = "\n".join(_part(name) for name in _SCRIPTS)
    return Template(_part("template.html")).substitute(
        title=html.escape(f"{counted(len(runs), 'run')} compared"),
        style=_part("style.css"),
        data=script_json(page_data(runs, metric, price, left_out)),
        script=f'"use strict";\n(() => {{\n{scripts}\n}})();',
    )


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no name in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return resources.files("pipeline.tracking.report").joinpath(name).read_text(encoding="utf-8")
