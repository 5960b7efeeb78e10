"""Commands printed in README.md and docs/ exist as printed: command, options, recipe, override keys."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from launch.sweep.config import load_sweep
from pipeline.config_load import load_config
from tests.tracking.made_runs import write_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:\.venv/bin/)?rookery .*$", re.MULTILINE)
# In docs/papers.md whole commands stand in tables; elsewhere such words are but names of commands.
INLINE = re.compile(r"`(rookery \w+ [^`]+)`")


def printed() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            joined = block.replace("\\\n", " ")
            found += [(page.name, line.split("   #")[0].strip()) for line in COMMAND.findall(joined)]
    papers = (ROOT / "docs" / "papers.md").read_text()
    return found + [("papers.md", line) for line in dict.fromkeys(INLINE.findall(papers))]


@pytest.fixture(scope="module")
def commands() -> dict[str, object]:
    from launch.cli import _commands

    group = get_command(_commands)
    return dict(group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("page", "line"), printed())
def test_command_exists_as_printed(page: str, line: str, commands: dict[str, object]) -> None:
    _, name, *arguments = shlex.split(line)
    assert name in commands, f"{page}: {line}"
    command = commands[name]
    context = command.make_context(name, list(arguments), resilient_parsing=False)  # type: ignore[attr-defined]
    recipe = context.params.get("config") or context.params.get("recipe")
    if recipe is not None and str(recipe).startswith("configs/"):
        load_config(ROOT / recipe, context.params.get("overrides") or [])
    if name == "sweep":
        load_sweep(ROOT / context.params["file"], context.params.get("overrides") or [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" in target:
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What can be linked to in a page: its headings in lower case, without signs, a dash for every space."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_compare_section_runs_as_printed(
    commands: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, top1 in enumerate((0.75, 0.85)):
        write_run(tmp_path / "runs" / f"demo-seed{seed}", [0.5, top1], seed=seed)
    section = (ROOT / "README.md").read_text().split("## Compare experiments")[1].split("\n## ")[0]
    lines = [line.split("   #")[0].strip() for line in COMMAND.findall(section)]
    assert len(lines) >= 3
    for line in lines:
        commands["compare"].main(shlex.split(line)[2:], standalone_mode=False)  # type: ignore[attr-defined]
    assert "80.00 ± 7.07" in capsys.readouterr().out
    for name, part in {
        "report.html": "<!doctype html>",
        "runs.csv": "demo-seed1",
        "table.tex": r"$\mathbf{80.00}",
    }.items():
        assert part in (tmp_path / name).read_text()


def test_every_command_is_in_the_readme(commands: dict[str, object]) -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in commands if f"`rookery {name}" not in text]
    assert not missing
