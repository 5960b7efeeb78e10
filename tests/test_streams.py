"""Standard streams that are closed, full, or left by their reader."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = "from launch.cli import app; app()"


def run(program: str, *arguments: str, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python by a shell, which does to its streams what `before` and `after` say."""
    line = f'{before} "$0" -c "$@" {after}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_ctrl_c_while_modules_are_read() -> None:
    """Ended by the signal, and no traceback."""
    program = (
        "import os, signal, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'launch.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from launch.command import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_full_output_is_told() -> None:
    done = run(COMMAND, "config", "configs/demo.yaml", after=">/dev/full")
    assert done.returncode == 2
    assert done.stderr == "rookery: the output: No space left on device; free space, or write elsewhere\n"


@pytest.mark.parametrize("after", [">/dev/full 2>/dev/full", "| head -c 1; exit ${PIPESTATUS[0]}", ">&- 2>&-"])
def test_long_work_goes_on_without_its_log(after: str, tmp_path: Path) -> None:
    """What is printed is lost, the file that is written next is not, and nothing of the one is in the other."""
    program = (
        "import contextlib, os, sys; from pipeline.streams import drop_unprintable, open_closed; open_closed()\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    drop_unprintable(); print('x' * 100_000, flush=True); print('y', file=sys.stderr)\n"
        "    with contextlib.suppress(OSError): os.write(2, b'of a library')\n"
        "    file.write('whole')\n"
    )
    assert run(program, str(tmp_path / "made"), after=after).returncode == 0
    assert (tmp_path / "made").read_text() == "whole"


def test_sigterm_is_ctrl_c_for_commands_that_have_no_answer_of_their_own() -> None:
    program = (
        "import os, signal, launch.compare_cli as c\n"
        "def stopped(paths):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); raise AssertionError\n"
        "    finally:\n"
        "        print('tidied')\n"
        "c.summarize_all = stopped\n" + COMMAND
    )
    done = run(program, "compare", "runs")
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "tidied\n", "")


@pytest.mark.parametrize("arguments", [("compare", "../runs"), ("train", "demo.yaml")])
def test_a_working_directory_that_is_gone(arguments: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    program = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(folder)!r}); os.rmdir({str(folder)!r})"
    done = run(f"{program}; {COMMAND}", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("rookery: the working directory is gone")


def test_what_an_encoding_lacks_is_escaped() -> None:
    done = run(
        "from pipeline.streams import name_output; name_output(); print('\u25b2')", before="PYTHONIOENCODING=latin1"
    )
    assert (done.returncode, done.stdout) == (0, "\\u25b2\n")
