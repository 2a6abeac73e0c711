"""A hub on the loopback interface that speaks as much of the Hugging Face hub's protocol as its own clients use to read.

Repositories are folders; every one has the branch `main` and one commit, which is given. Used through HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]  # status, headers, content
RESOLVE = re.compile(
    r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)
INFO = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+))?(?P<path>/.*)?"
)


@dataclass
class LoopbackHub:
    """repositories: "models/<owner>/<name>" or "datasets/<owner>/<name>" -> (folder, commit); gated: those that answer 403."""

    repositories: dict[str, tuple[Path, str]]
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """Status, headers and content for one request."""
        self.asked.append(f"{method} {path}")
        bare = unquote(urlsplit(path).path)
        match = RESOLVE.fullmatch(bare)
        if match is not None:
            return self._file(
                f"{'datasets' if match['kind'] else 'models'}/{match['name']}",
                match["revision"],
                match["file"],
            )
        match = INFO.fullmatch(bare)
        if match is None:
            return _error(404, "EntryNotFound")
        name, query = f"{match['kind']}/{match['name']}", urlsplit(path).query.lower()
        return self._about(
            name, match["what"], match["revision"] or "main", match["path"] or "", query, body
        )

    def _file(self, name: str, revision: str, file: str) -> Answer:
        refusal = self._refusal(name, revision)
        if refusal is not None:
            return refusal
        folder, commit = self.repositories[name]
        if not (folder / file).is_file():
            return _error(404, "EntryNotFound")
        content = (folder / file).read_bytes()
        return (
            200,
            {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'},
            content,
        )

    def _about(
        self, name: str, what: str | None, revision: str, path: str, query: str, body: bytes
    ) -> Answer:
        refusal = self._refusal(name, revision)
        if refusal is not None:
            return refusal
        folder, commit = self.repositories[name]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        entries = [_entry(file, file.relative_to(folder).as_posix()) for file in files]
        folders = sorted({str(file.relative_to(folder).parent) for file in files} - {"."})
        entries += [
            {"type": "directory", "path": each, "oid": "0" * 40, "size": 0} for each in folders
        ]
        if what == "tree":
            below = path.strip("/")
            inside = [
                entry
                for entry in entries
                if str(Path(entry["path"]).parent) == (below or ".") or "recursive=true" in query
            ]
            return (
                (200, {}, json.dumps(inside).encode()) if inside else _error(404, "EntryNotFound")
            )
        if what == "paths-info":
            wanted = _paths(body)
            return (
                200,
                {},
                json.dumps([entry for entry in entries if entry["path"] in wanted]).encode(),
            )
        siblings = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
        about = {
            "id": name.partition("/")[2],
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "gated": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        return 200, {}, json.dumps(about).encode()

    def _refusal(self, name: str, revision: str) -> Answer | None:
        if name not in self.repositories:
            return _error(404, "RepoNotFound")
        if name in self.gated:
            return _error(403, "GatedRepo")
        return (
            None
            if revision in ("main", self.repositories[name][1])
            else _error(404, "RevisionNotFound")
        )


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """The hub at `hub.address` while the body runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = hub.answer(self.command, self.path, body)
            if self.headers.get("Range") and status == 200:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                status, content = 206, content[int(first) : int(last) + 1 if last else None]
            self.send_response(status)
            for header, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                **headers,
            }.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = respond

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(file: Path, path: str) -> dict[str, Any]:
    content = file.read_bytes()
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }


def _paths(body: bytes) -> set[str]:
    try:
        asked = json.loads(body)["paths"]
        return {asked} if isinstance(asked, str) else set(asked)
    except ValueError:
        return set(parse_qs(body.decode()).get("paths", []))


def _error(status: int, code: str) -> Answer:
    return (
        status,
        {"X-Error-Code": code, "X-Error-Message": code},
        json.dumps({"error": code}).encode(),
    )
