"""Folders and files that lead somewhere else, never end, or are nothing at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

from tests.data_prep.helpers import encoded, make_tar, pixels
from tests.fuzzing import generator

# Makes a source in a folder and returns what to name on the command line.
Make = Callable[[Path], Path]


def _folder(do: Callable[[Path], object]) -> Make:
    """Class folders `ant` and `bee` with two good pictures each, and what else `do` puts there."""

    def make(top: Path) -> Path:
        source = top / "source"
        for number, name in enumerate(("ant/0.jpg", "ant/1.jpg", "bee/0.jpg", "bee/1.jpg")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(encoded(pixels(number)))
        (top / "outside").mkdir()
        (top / "outside" / "secret.jpg").write_bytes(encoded(pixels(9)))
        do(source)
        return source

    return make


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def _socket(path: Path) -> None:
    with chdir(path.parent):  # its name has room for 108 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)


def _raw(path: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(path) + b"/" + name)).write_bytes(encoded(pixels(5)))


def _deep(path: Path, levels: int) -> None:
    with chdir(path):
        for _ in range(levels):
            Path("d").mkdir()
            os.chdir("d")
        Path("deep.jpg").write_bytes(encoded(pixels(5)))


def _ladder(path: Path, steps: int) -> None:
    """Folders with two links each to the next: 2^steps ways to the last one."""
    for step in range(steps):
        (path / f"l{step}").mkdir()
    for step in range(steps - 1):
        for side in ("x", "y"):
            (path / f"l{step}" / side).symlink_to(f"../l{step + 1}")


FOLDERS: dict[str, Make] = {
    "name that is not UTF-8": _folder(lambda s: _raw(s / "ant", b"\xff\xfe.jpg")),
    "class that is not UTF-8": _folder(lambda s: (s / "ant").rename(os.fsdecode(os.fsencode(s) + b"/\xe9t\xff"))),
    "name with line feeds and escapes": _folder(lambda s: _raw(s / "ant", b"a\n\x1b[31mred\x07.jpg")),
    "bad picture with a name of escapes": _folder(lambda s: (s / "ant" / "\x1b]0;x\x07\n.jpg").write_bytes(b"x")),
    "bad picture whose name is not UTF-8": _folder(
        lambda s: Path(os.fsdecode(os.fsencode(s) + b"/ant/\xff.jpg")).write_bytes(b"x")
    ),
    "name of 255 bytes": _folder(lambda s: _raw(s / "ant", b"n" * 251 + b".jpg")),
    "name like an option": _folder(lambda s: _raw(s / "ant", b"--out=.jpg")),
    "same name in other case": _folder(lambda s: _raw(s / "ant", b"0.JPG")),
    "same stem": _folder(lambda s: _raw(s / "ant", b"0.png")),
    "link to a file outside": _folder(lambda s: (s / "ant/l.jpg").symlink_to("../../outside/secret.jpg")),
    "link to a folder outside": _folder(lambda s: (s / "cat").symlink_to("../outside")),
    "dangling link": _folder(lambda s: (s / "ant/l.jpg").symlink_to("nowhere")),
    "link to itself": _folder(lambda s: (s / "ant/l.jpg").symlink_to("l.jpg")),
    "link to the folder it is in": _folder(lambda s: (s / "ant/again").symlink_to(".")),
    "link to the folder above": _folder(lambda s: (s / "ant/up").symlink_to("..")),
    "links across": _folder(lambda s: [(s / "ant/b").symlink_to("../bee"), (s / "bee/a").symlink_to("../ant")]),
    "a million ways to a folder": _folder(lambda s: _ladder(s / "ant", 25)),
    "link to zeros without end": _folder(lambda s: (s / "ant/z.jpg").symlink_to("/dev/zero")),
    "link to the terminal": _folder(lambda s: (s / "ant/z.jpg").symlink_to("/dev/tty")),
    "pipe": _folder(lambda s: os.mkfifo(s / "ant/p.jpg")),
    "link to a pipe": _folder(lambda s: [os.mkfifo(s / ".p"), (s / "ant/p.jpg").symlink_to("../.p")]),
    "socket": _folder(lambda s: _socket(s / "ant/s.jpg")),
    "file of 100 GB": _folder(lambda s: sparse(s / "ant/large.jpg", 10**11)),
    "file of 65 MiB": _folder(lambda s: sparse(s / "ant/large.jpg", 65 * 2**20)),
    "500 folders deep": _folder(lambda s: _deep(s / "ant", 500)),
    "class without pictures": _folder(lambda s: (s / "cat").mkdir()),
    "classes without pictures": _folder(lambda s: [path.unlink() for path in s.glob("*/*")]),
    "hard link": _folder(lambda s: os.link(s / "ant/0.jpg", s / "bee/h.jpg")),
}


def single(do: Callable[[Path], object], name: str = "source") -> Make:
    def make(top: Path) -> Path:
        do(top / name)
        return top / name

    return make


FILES: dict[str, Make] = {
    "empty file": single(lambda p: p.write_bytes(b"")),
    "noise": single(lambda p: p.write_bytes(generator("noise").randbytes(10_000))),
    "zeros": single(lambda p: p.write_bytes(bytes(10_240))),
    "empty folder": single(lambda p: p.mkdir()),
    "pipe": single(os.mkfifo),
    "zeros without end": single(lambda p: p.symlink_to("/dev/zero")),
    "link to itself": single(lambda p: p.symlink_to(p)),
    "empty tar": single(lambda p: make_tar(p, {}), "train.tar"),
    "tar of text": single(lambda p: make_tar(p, {"a.txt": b"x", "b.txt": b"y"}), "train.tar"),
    "picture": single(lambda p: p.write_bytes(encoded(pixels(1))), "train.tar"),
    "zip": single(lambda p: p.write_bytes(b"PK\x03\x04" + bytes(1000)), "train.tar"),
}
