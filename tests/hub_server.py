"""A stand-in for the Hugging Face Hub: the few answers of it that reading a data set takes, made up after its client.

It is no Hub: that these are the answers which the Hub gives is known from the client that reads them, not tried.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faulty_server import Answer, Request, folder

REPOSITORY = "me/set"
PAGE = 5  # entries of a listing; the Hub has 1000


def hub(root: Path, token: str | None = None) -> Callable[[Request], Answer]:
    """Answers for `datasets/me/set`, which holds the files below a folder.

    Args:
        token: without it nothing is shown, as of a private repository.
    """
    files, api = folder(root), f"/api/datasets/{REPOSITORY}"

    def answer(request: Request) -> Answer:
        path, query = urlsplit(request.path).path, parse_qs(urlsplit(request.path).query)
        if path.startswith("/cdn/"):  # as the Hub sends on to another host, whose addresses are signed
            assert "authorization" not in request.headers or token is not None
            return files(Request(request.method, path.removeprefix("/cdn"), request.headers))
        given = request.headers.get("authorization")
        if given not in (None, f"Bearer {token}"):
            return Answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if REPOSITORY not in path or (token is not None and given is None):
            return Answer(404 if given else 401, b"", {"X-Error-Code": "RepoNotFound"})
        if path in (api, f"{api}/revision/main"):
            return _json({"id": REPOSITORY, "sha": "0" * 40, "private": token is not None, "tags": []})
        if path.startswith(f"{api}/revision/"):
            return Answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"{api}/tree/main"):
            return _tree(root, unquote(path.removeprefix(f"{api}/tree/main")).strip("/"), query, request)
        wanted = path.removeprefix(f"/datasets/{REPOSITORY}/resolve/main/")
        if wanted == path or not (root / unquote(wanted)).is_file():
            return Answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return Answer(302, b"", {"Location": f"/cdn/{wanted}"})

    return answer


def _tree(root: Path, path: str, query: dict[str, list[str]], request: Request) -> Answer:
    """A page of what lies in a folder, with the address of the next one."""
    if not (root / path).is_dir():
        return Answer(404, b"", {"X-Error-Code": "EntryNotFound"})
    first = int(query.get("cursor", ["0"])[0])
    found = sorted((root / path).iterdir())
    entries = [_entry(root, file) for file in found[first : first + PAGE]]
    if first + PAGE >= len(found):
        return _json(entries)
    here = f"http://{request.headers['host']}{urlsplit(request.path).path}"
    return _json(entries, {"Link": f'<{here}?cursor={first + PAGE}>; rel="next"'})


def _entry(root: Path, file: Path) -> dict[str, object]:
    name = str(file.relative_to(root))
    oid = hashlib.sha1(name.encode()).hexdigest()
    if file.is_dir():
        return {"type": "directory", "oid": oid, "size": 0, "path": name}
    size = file.stat().st_size
    stored = {"oid": hashlib.sha256(file.read_bytes()).hexdigest(), "size": size, "pointerSize": 134}
    return {"type": "file", "oid": oid, "size": size, "path": name, "lfs": stored}


def _json(content: object, headers: dict[str, str] | None = None) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))
