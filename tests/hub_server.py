"""A Hub on the loopback: real HTTP for the real huggingface_hub client, from folders on the disk.

    with HubServer({"org/pool": folder}) as hub:
        subprocess.run(command, env=os.environ | hub.env(home=tmp_path))

Speaks what the client asks for models and datasets: info, the paginated tree, and `resolve` with etags, ranges, error
codes and, like the real Hub, a redirect of large files to another host (here the same server under the name
`localhost`). huggingface_hub reads `HF_ENDPOINT` when it is imported, so the client has to be another process (see
`env`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

from tolerances import PATIENCE

GOOD_TOKEN = "good-token"
"""Its account may read every repository."""
STRANGER_TOKEN = "stranger-token"
"""A valid token whose account may read neither gated nor private repositories."""

LARGE = (".safetensors", ".bin", ".gguf")
FOREVER = math.inf
OPTIONS = {"author": "", "search": "", "cursor": "0"}  # of a listing, with what they are where they are left out


@dataclass(frozen=True)
class RepoFile:
    """One file of one commit."""

    path: str
    source: Path

    @property
    def large(self) -> bool:
        return self.path.endswith(LARGE)

    @cached_property
    def size(self) -> int:
        return self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.source.read_bytes()).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id

    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": self.path, "size": self.size, "oid": self.blob_id}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    """What a folder held when it was added; the sha depends on nothing but paths and contents."""

    sha: str
    files: dict[str, RepoFile]

    @classmethod
    def of(cls, folder: Path) -> Commit:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {name: RepoFile(name, path) for path in paths for name in [path.relative_to(folder).as_posix()]}
        text = "".join(f"{name} {file.blob_id}\n" for name, file in files.items())
        return cls(hashlib.sha1(text.encode()).hexdigest(), files)

    def tree(self, below: str, recursive: bool) -> list[dict[str, Any]]:
        """The entries below a folder, folders included, in the Hub's format."""
        folders = {parent.as_posix() for name in self.files for parent in list(Path(name).parents)[:-1]}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
        ]
        entries += [file.entry() for file in self.files.values()]
        root = f"{below}/" if below else ""
        inside = [entry for entry in entries if entry["path"].startswith(root)]
        direct = [entry for entry in inside if "/" not in entry["path"].removeprefix(root)]
        return sorted(inside if recursive else direct, key=lambda entry: entry["path"])


@dataclass
class Repo:
    """Commits and the names (branches, tags) that point to them."""

    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass(frozen=True)
class Request:
    """One request as the server saw it, with what it answered."""

    method: str
    path: str
    kind: str  # "list", "info", "tree", "resolve", "content" (the bytes of a file) or "other"
    file: str | None
    range: str | None
    token: str | None
    status: int


class HubServer:
    """Serves `{repo_id: folder}` until the `with` block ends; the id of a dataset is `datasets/org/name`.

    Attributes:
        url: what `HF_ENDPOINT` has to be.
        requests: every request so far, in the order of the answers.
        peak: the largest number of files that were on their way at one time.
        together: no file is sent before so many are on their way at one time.
        page_size: entries per page of a tree.
        outage: an HTTP status to answer everything with.
        handler: what answers; `hub_uploads` has one that takes files too.
    """

    handler: type[Handler] | None = None

    def __init__(
        self,
        repos: Mapping[str, Path],
        *,
        gated: Iterable[str] = (),
        private: Iterable[str] = (),
        page_size: int = 1000,
    ) -> None:
        self.repos: dict[str, Repo] = {}
        for repo_id, folder in repos.items():
            self.add(repo_id, folder)
        for repo_id in gated:
            self.repos[repo_id].gated = True
        for repo_id in private:
            self.repos[repo_id].private = True
        self.page_size = page_size
        self.together = 1
        self._met = threading.Event()
        self.outage: int | None = None
        self.requests: list[Request] = []
        self.peak = 0
        self._underway = 0
        self._cuts: dict[str, _Cut] = {}
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, folder: Path, *refs: str) -> str:
        """Commit a folder and let `refs` (default: main) point to it; returns the commit's sha."""
        repo, commit = self.repos.setdefault(repo_id, Repo()), Commit.of(folder)
        repo.commits[commit.sha] = commit
        repo.refs.update(dict.fromkeys(refs or ("main",), commit.sha))
        return commit.sha

    def cut(self, file: str, *, times: float = 1, after: int = 0, reset: bool = False) -> None:
        """Drop the connection after that many bytes of a file's body, the next `times` times it is sent.

        A dropped connection ends in silence (FIN); with `reset` the peer is told so (RST).
        """
        self._cuts[file] = _Cut(times, after, reset)

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        """What a client process needs in its environment, to be put on top of `os.environ`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", **extra}

    def fetched(self, name: str = "") -> list[str]:
        """The files whose content was sent (once per GET), of those whose path ends with `name`."""
        return [r.file for r in self.requests if r.kind == "content" and r.file is not None and r.file.endswith(name)]

    def clear(self) -> None:
        """Forget the requests so far."""
        with self._lock:
            self.requests.clear()
            self.peak = 0

    def close(self) -> None:
        """Stop, and close the connections that clients keep alive. Fails if a handler failed."""
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()
        assert not self._server.failures, self._server.failures

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Called by the handlers' threads.

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def begin_file(self, file: str) -> _Cut | None:
        """Count a file that starts; returns how it has to break off, if it has to."""
        with self._lock:
            self._underway += 1
            self.peak = max(self.peak, self._underway)
            if self.peak >= self.together:
                self._met.set()
            cut = self._cuts.get(file)
            if cut is None or cut.times <= 0:
                return None
            cut.times -= 1
            return cut

    def wait_for_others(self) -> None:
        """Until as many files are on their way as have to be."""
        assert self._met.wait(PATIENCE), f"never {self.together} at one time"

    def end_file(self) -> None:
        with self._lock:
            self._underway -= 1


@dataclass
class _Cut:
    times: float
    after: int
    reset: bool


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.failures: list[str] = []
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), hub.handler or Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client may leave when it likes
            self.failures.append(repr(error))


@dataclass
class Refusal(Exception):
    status: int
    code: str | None
    message: str
    commit: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._refuse(Refusal(404, None, "not served here"), "other")

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _answer(self) -> None:
        url = urlsplit(self.path)
        kind, arguments = _route(url.path)
        try:
            if self.hub.outage is not None:
                raise Refusal(self.hub.outage, None, "out of order")
            if kind == "cdn":
                self._content(self._in_store(*arguments))
            elif kind == "list":
                self._list(parse_qs(url.query))
            elif kind == "info":
                self._info(*arguments)
            elif kind == "tree":
                self._tree(*arguments, options=dict(parse_qsl(url.query)))
            elif kind == "resolve":
                self._resolve(*arguments)
            else:
                raise Refusal(404, None, "not served here")
        except Refusal as refusal:
            self._refuse(refusal, kind)

    def _find(self, repo_id: str, revision: str) -> tuple[Repo, Commit]:
        """The repository and the commit, if this token may see them: 401 and 404 are as odd as on the Hub."""
        repo = self.hub.repos.get(repo_id)
        if self.token not in (None, GOOD_TOKEN, STRANGER_TOKEN):
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and self.token != GOOD_TOKEN):
            if self.token is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        commit = repo.commit(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def _list(self, options: dict[str, list[str]]) -> None:
        """Models of an owner whose ids contain a text, in pages, as `list_models` asks for them."""
        [author], [text], [page] = (options.get(name, [own]) for name, own in OPTIONS.items())
        mine = [
            name for name in sorted(self.hub.repos) if name.startswith(f"{author}/") and text.lower() in name.lower()
        ]
        seen = [name for name in mine if not self.hub.repos[name].private or self.token == GOOD_TOKEN]
        start, stop = int(page) * self.hub.page_size, (int(page) + 1) * self.hub.page_size
        entries = []
        for name in seen[start:stop]:
            commit = self.hub.repos[name].commit("main")
            entries.append({"id": name, "modelId": name, "sha": commit.sha if commit else None})
        query = urlencode({**{name: values[0] for name, values in options.items()}, "cursor": int(page) + 1})
        more = {"Link": f'<{self.hub.url}/api/models?{query}>; rel="next"'}
        self._json(entries, "list", more if stop < len(seen) else None)

    def _info(self, repo_id: str, revision: str) -> None:
        repo, commit = self._find(repo_id, revision)
        info = {
            "id": repo_id,
            "sha": commit.sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "siblings": [{"rfilename": path} for path in commit.files],
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self._json(info, "info")

    def _tree(self, repo_id: str, revision: str, below: str, *, options: dict[str, str]) -> None:
        _, commit = self._find(repo_id, revision)
        page, recursive = int(options.get("cursor", "0")), options.get("recursive") == "true"
        entries = commit.tree(below, recursive)
        if below and not entries:
            raise Refusal(404, "EntryNotFound", f"{below} does not exist on {revision!r}", commit.sha)
        start, stop = page * self.hub.page_size, (page + 1) * self.hub.page_size
        here = urlsplit(self.path).path
        more = {"Link": f'<{self.hub.url}{here}?recursive={str(recursive).lower()}&cursor={page + 1}>; rel="next"'}
        self._json(entries[start:stop], "tree", more if stop < len(entries) else None)

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo, commit = self._find(repo_id, revision)
        if repo.gated and self.token != GOOD_TOKEN:
            status = 401 if self.token is None else 403
            raise Refusal(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", commit.sha)
        if not file.large:
            return self._content(file, commit.sha)
        headers = {
            "Location": f"http://localhost:{self.hub.port}/cdn/{quote(repo_id)}/{commit.sha}/{quote(path)}",
            "X-Repo-Commit": commit.sha,
            "X-Linked-Size": str(file.size),
            "X-Linked-Etag": f'"{file.etag}"',
        }
        self._start(302, headers, 0)
        self._record("resolve", path, 302)

    def _in_store(self, repo_id: str, sha: str, path: str) -> RepoFile:
        return self.hub.repos[repo_id].commits[sha].files[path]

    def _content(self, file: RepoFile, commit: str | None = None) -> None:
        body = file.source.read_bytes()
        begin, status = 0, 200
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if commit is not None:
            headers["X-Repo-Commit"] = commit
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(wanted[1]), int(wanted[2] or file.size - 1)
            if begin >= file.size:
                raise Refusal(416, None, "Range not satisfiable")
            body, status = body[begin : end + 1], 206
            headers["Content-Range"] = f"bytes {begin}-{end}/{file.size}"
        if self.command == "HEAD":
            self._start(status, headers, len(body))
            return self._record("resolve", file.path, status)
        self._record("content", file.path, status)
        self._send(file, status, headers, body)

    def _send(self, file: RepoFile, status: int, headers: dict[str, str], body: bytes) -> None:
        cut = self.hub.begin_file(file.path)
        try:
            self.hub.wait_for_others()
            self._start(status, headers, len(body))
            self.wfile.write(body if cut is None else body[: cut.after])
            if cut is not None:
                self._break_off(cut)
        finally:
            self.hub.end_file()

    def _break_off(self, cut: _Cut) -> None:
        self.wfile.flush()
        self.close_connection = True
        if cut.reset:
            time.sleep(0.2)  # a reset throws away what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _refuse(self, refusal: Refusal, kind: str) -> None:
        headers = {"X-Error-Message": refusal.message}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        if refusal.commit is not None:
            headers["X-Repo-Commit"] = refusal.commit
        self._json({"error": refusal.message}, kind, headers, refusal.status)

    def _json(self, value: Any, kind: str, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._start(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)
        self._record(kind, None, status)

    def _start(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _record(self, kind: str, file: str | None, status: int) -> None:
        wanted = self.headers.get("Range")
        self.hub.record(Request(self.command, self.path, kind, file, wanted, self.token, status))


def _route(path: str) -> tuple[str, tuple[str, ...]]:
    """`/api/models/org/name/tree/main` to ("tree", ("org/name", "main", "")); slashes in a revision are quoted."""
    for prefix, as_model in (("/api/datasets/", "/api/models/"), ("/datasets/", "/")):
        if path.startswith(prefix):
            kind, arguments = _route(as_model + path.removeprefix(prefix))
            return kind, (f"datasets/{arguments[0]}", *arguments[1:]) if arguments else ()
    match [unquote(part) for part in path.strip("/").split("/")]:
        case ["api", "models"]:
            return "list", ()
        case ["api", "models", org, name]:
            return "info", (f"{org}/{name}", "main")
        case ["api", "models", org, name, "revision", revision]:
            return "info", (f"{org}/{name}", revision)
        case ["api", "models", org, name, "tree", revision, *below]:
            return "tree", (f"{org}/{name}", revision, "/".join(below))
        case ["cdn", org, name, sha, *parts]:
            return "cdn", (f"{org}/{name}", sha, "/".join(parts))
        case [org, name, "resolve", revision, *parts]:
            return "resolve", (f"{org}/{name}", revision, "/".join(parts))
    return "other", ()
