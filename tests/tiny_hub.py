"""A Hub on 127.0.0.1 that serves repositories and collections, read only, as huggingface_hub 2.4 asks."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class TinyHub:
    """`repositories`: id → folder; `collections`: slug → items; `asked`: every path that was asked for."""

    repositories: dict[str, Path]
    collections: dict[str, list[dict]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, repository: str) -> str:
        """40 hex digits that change with the files."""
        digest = hashlib.sha1()
        for name, data in self.files(repository).items():
            digest.update(name.encode() + data)
        return digest.hexdigest()

    def files(self, repository: str) -> dict[str, bytes]:
        root = self.repositories[repository]
        return {
            p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
        }

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        self.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "collections"]:
            return self.of_collection("/".join(parts[2:]))
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit, files = self.commit(repository), self.files(repository)
        if parts[0] == "api" and "tree" in parts:
            return as_json(
                [{"type": "file", "path": n, "size": len(d), "oid": oid(d)} for n, d in files.items()]
            )
        if parts[0] == "api":
            return as_json({"id": repository, "sha": commit, "siblings": [], "tags": [], "private": False})
        data = files["/".join(parts[4:])]  # owner/name/resolve/commit/file
        return 200, {"ETag": f'"{oid(data)}"', "X-Repo-Commit": commit}, data

    def of_collection(self, slug: str) -> tuple[int, dict[str, str], bytes]:
        if slug not in self.collections:
            return 404, {"X-Error-Message": "Collection not found"}, b"{}"
        about = {
            "title": "t",
            "owner": {"name": "o"},
            "lastUpdated": "2025-01-01T00:00:00.000Z",
            "position": 0,
        }
        more = {"private": False, "theme": "blue", "upvotes": 0, "items": self.collections[slug]}
        return as_json({"slug": slug, **about, **more})


def item(repository: str, note: str | None = None, kind: str = "model") -> dict:
    """A collection's item as the Hub gives it."""
    about = {"_id": hashlib.md5(repository.encode()).hexdigest()[:24], "position": 0}
    return {**about, "id": repository, "type": kind} | ({"note": {"text": note}} if note else {})


def as_json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def oid(data: bytes) -> str:
    """A git blob's name."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serving(hub: TinyHub) -> Iterator[TinyHub]:
    """`hub`, with its endpoint, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
