"""A Hub on 127.0.0.1 for the tests: the part of the protocol that pushing and reading back needs.

Repositories with branches and commits, private ones, tokens; small text files in the commit, others by LFS,
whose sha256 is checked on arrival and again when they are committed. What the real Hub refuses, this refuses.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {"hf_me": "me", "hf_other": "other"}
READ_ONLY = "hf_me_read"
LFS_SUFFIXES = (".safetensors",)
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset)s/{ID}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Refused(Exception):
    """An answer that is no success: status, error code and message as the Hub's headers have them."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Repo:
    """Commits are {path: content}; a branch is the name of one."""

    id: str
    kind: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        listing = {path: sha256(data) for path, data in files.items()}
        about = [len(self.commits), self.branches.get(branch), listing, message]
        name = hashlib.sha1(json.dumps(about).encode(), usedforsecurity=False).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def at(self, revision: str) -> str:
        """The commit of a branch or commit name."""
        name = self.branches.get(revision, revision)
        if name not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name


class Hub:
    """State of the server.

    corrupt: repositories whose large files lose a bit on their way. raced: those in which somebody else
    commits while an upload is under way.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[tuple[str, str], bytes] = {}
        self.requests: list[str] = []
        self.corrupt: set[str] = set()
        self.raced: set[str] = set()
        self.lock = threading.Lock()

    def repo(self, kind: str, name: str, user: str | None) -> Repo:
        """A repository that this user may see."""
        found = self.repos.get((kind, name))
        if found is None or (found.private and user != name.split("/")[0]):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return found


class Handler(BaseHTTPRequestHandler):
    """One request; routes are tried in order."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self.chunks())
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                for method, pattern, answer in ROUTES:
                    if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                        return answer(self, **match.groupdict())
                raise Refused(404, f"no route for {self.command} {path}")
            except Refused as refused:
                headers = {"X-Error-Message": refused.message}
                headers |= {"X-Error-Code": refused.code} if refused.code else {}
                self.reply({"error": refused.message}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def reply(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str | None:
        given = self.headers.get("Authorization")
        return given.removeprefix("Bearer ") if given else None

    @property
    def user(self) -> str | None:
        if self.token is None:
            return None
        if self.token == READ_ONLY:
            return "me"
        if self.token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[self.token]

    def writer(self, owner: str) -> None:
        """Refuse whoever may not write into this namespace."""
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.user != owner or self.token == READ_ONLY:
            raise Refused(403, f"You don't have the rights to write under the namespace {owner!r}")

    # ---- repositories

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        self.reply({"name": self.user, "type": "user", "orgs": []})

    def create(self) -> None:
        about = json.loads(self.body)
        owner = about["organization"] or self.user
        self.writer(str(owner))
        kind, name = about.get("type", "model"), f"{owner}/{about['name']}"
        if (kind, name) in self.hub.repos:
            raise Refused(409, "You already created this repo")
        private = about.get("private", about.get("visibility") == "private")
        self.hub.repos[kind, name] = repo = Repo(name, kind, private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        prefix = "datasets/" if kind == "dataset" else ""
        self.reply({"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": name})

    def branch(self, kind: str, id: str, branch: str) -> None:
        self.writer(id.split("/")[0])
        repo = self.hub.repo(kind, id, self.user)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = repo.at(start)
        self.reply({})

    def info(self, kind: str, id: str, revision: str | None = None) -> None:
        repo = self.hub.repo(kind, id, self.user)
        name = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[name]]
        about: dict[str, Any] = {"id": id, "modelId": id, "sha": name, "private": repo.private, "tags": []}
        self.reply({**about, "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, kind: str, id: str, revision: str, folder: str | None = None) -> None:
        repo = self.hub.repo(kind, id, self.user)
        files = repo.commits[repo.at(revision)]
        under = f"{folder.strip('/')}/" if folder else ""
        rows = [self.row(path, data) for path, data in files.items() if path.startswith(under)]
        if under and not rows:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self.reply(rows)

    def row(self, path: str, data: bytes) -> dict[str, Any]:
        about: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
        if path.endswith(LFS_SUFFIXES):
            about["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        return about

    def resolve(self, id: str, revision: str, file: str, datasets: str | None = None) -> None:
        repo = self.hub.repo("dataset" if datasets else "model", id, self.user)
        name = repo.at(revision)
        if file not in repo.commits[name]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = repo.commits[name][file]
        etag = sha256(data) if file.endswith(LFS_SUFFIXES) else git_sha1(data)
        self.reply(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": name, "Accept-Ranges": "none"})

    # ---- uploads

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        table = yaml.safe_load(head[1]) if head else None
        if not isinstance(table, dict) or not all(isinstance(tag, str) for tag in table.get("tags", [])):
            wrong = {"errors": [{"message": "metadata is not a table with a list of tags"}], "warnings": []}
            return self.reply(wrong, 400)
        self.reply({"errors": [], "warnings": []})

    def preupload(self, kind: str, id: str, revision: str) -> None:
        self.writer(id.split("/")[0])
        repo = self.hub.repo(kind, id, self.user)
        files = repo.commits[repo.at(revision)]
        if id in self.hub.raced:
            repo.commit("main", {**files, "theirs.txt": b"quicker"}, "Theirs")
        rows = []
        for one in json.loads(self.body)["files"]:
            path = one["path"]
            large = path.endswith(LFS_SUFFIXES)
            old = (sha256 if large else git_sha1)(files[path]) if path in files else None
            rows.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            rows[-1]["oid"] = old
        self.reply({"files": rows})

    def batch(self, id: str, datasets: str | None = None) -> None:
        self.writer(id.split("/")[0])
        rows = []
        for one in json.loads(self.body)["objects"]:
            rows.append({"oid": one["oid"], "size": one["size"]})
            if (id, one["oid"]) not in self.hub.large:
                url = f"{self.hub.url}/lfs/{id}/{one['oid']}"
                rows[-1]["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
        self.reply({"transfer": "basic", "objects": rows})

    def put(self, id: str, oid: str) -> None:
        data = self.body
        if id in self.hub.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        if sha256(data) != oid:
            raise Refused(400, "the content's sha256 is not the one that was announced")
        self.hub.large[id, oid] = data
        self.reply(b"")

    def verify(self, id: str, oid: str) -> None:
        if len(self.hub.large.get((id, oid), b"")) != json.loads(self.body)["size"]:
            raise Refused(400, "no such upload of this size")
        self.reply({})

    def commit(self, kind: str, id: str, revision: str) -> None:
        self.writer(id.split("/")[0])
        repo = self.hub.repo(kind, id, self.user)
        head = repo.at(revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        about = next(line["value"] for line in lines if line["key"] == "header")
        if about.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if (id, value["oid"]) not in self.hub.large:
                    raise Refused(400, f"{value['path']}: its content was never uploaded")
                files[value["path"]] = self.hub.large[id, value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        name = repo.commit(revision, files, about["summary"])
        prefix = "datasets/" if kind == "dataset" else ""
        url = f"{self.hub.url}/{prefix}{id}/commit/{name}"
        self.reply({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})


ROUTES = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?P<folder>/.+)?", Handler.tree),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", API, Handler.info),
    ("POST", rf"/(?P<datasets>datasets/)?{ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", rf"/lfs/{ID}/(?P<oid>[0-9a-f]{{64}})", Handler.put),
    ("POST", rf"/lfs/{ID}/(?P<oid>[0-9a-f]{{64}})/verify", Handler.verify),
    ("GET|HEAD", rf"/(?P<datasets>datasets/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server in a thread, at `hub.url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
