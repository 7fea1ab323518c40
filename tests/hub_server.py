"""A Hub on the loopback: real HTTP for the real huggingface_hub client, from folders on the disk.

    with HubServer({"org/pool": folder}) as hub:
        hub.run(command, home=tmp_path)

Speaks what the client asks for models and datasets: info, the paginated tree, and `resolve` with etags, ranges, error
codes and, like the real Hub, a redirect of large files to another host (here the same server under the name
`localhost`). To whoever has the good token it also offers what the client needs to make repositories and to send files:
`repos/create`, `validate-yaml`, `preupload` and `commit`, without Git LFS and Xet, which are the client's own business.

huggingface_hub reads its `HF_*` variables when it is imported, so the client has to be another process.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import yaml

from tolerances import PATIENCE

GOOD_TOKEN = "good-token"
"""Its account may read and write every repository."""
STRANGER_TOKEN = "stranger-token"
"""A valid token whose account may read neither gated nor private repositories, and write none."""

LARGE = (".safetensors", ".bin", ".gguf")
FOREVER = math.inf
SOURCE = Path(__file__).parent.parent / "src"


@dataclass(frozen=True)
class RepoFile:
    """One file of one commit."""

    path: str
    source: Path

    @property
    def large(self) -> bool:
        return self.path.endswith(LARGE)

    @cached_property
    def content(self) -> bytes:
        return self.source.read_bytes()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id

    def entry(self) -> dict[str, Any]:
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "size": size, "pointerSize": 134}} if self.large else {}
        return {"type": "file", "path": self.path, "size": size, "oid": self.blob_id, **lfs}


@dataclass(frozen=True)
class Commit:
    """What a folder held when it was added; the sha depends on nothing but paths and contents."""

    sha: str
    files: dict[str, RepoFile]

    @classmethod
    def of(cls, folder: Path) -> Commit:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return cls.holding(RepoFile(path.relative_to(folder).as_posix(), path) for path in paths)

    @classmethod
    def holding(cls, files: Iterable[RepoFile]) -> Commit:
        by_path = {file.path: file for file in sorted(files, key=lambda file: file.path)}
        text = "".join(f"{path} {file.blob_id}\n" for path, file in by_path.items())
        return cls(hashlib.sha1(text.encode()).hexdigest(), by_path)


@dataclass
class Repo:
    """Commits and the names (branches, tags) that point to them."""

    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def put(self, commit: Commit, *refs: str) -> str:
        self.commits[commit.sha] = commit
        self.refs.update(dict.fromkeys(refs, commit.sha))
        return commit.sha


@dataclass(frozen=True)
class Request:
    """One request as the server saw it."""

    path: str
    kind: str  # "list", "info", "tree", "resolve", "content" (the bytes of a file), "upload" or "other"
    file: str | None
    token: str | None


class HubServer:
    """Serves `{repo_id: folder}` until the `with` block ends; the id of a dataset is `datasets/org/name`.

    Attributes:
        url: what `HF_ENDPOINT` has to be.
        requests: every request so far, in the order of the answers.
        together: no file is sent before so many are on their way at one time.
        page_size: entries per page of a tree.
        outage: an HTTP status to answer everything with.
        received: the message of every commit that was sent, and the paths of its files.
    """

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
            self.repos[repo_id].gated, self.repos[repo_id].private = repo_id in gated, repo_id in private
        self.page_size, self.together = page_size, 1
        self.outage: int | None = None
        self.requests: list[Request] = []
        self.received: list[tuple[str, list[str]]] = []
        self._folder = tempfile.TemporaryDirectory()
        self.store = Path(self._folder.name)
        self._met, self._underway = threading.Event(), 0
        self._cuts: dict[str, _Cut] = {}
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, folder: Path, *refs: str) -> str:
        """Commit a folder and let `refs` (default: main) point to it; returns the commit's sha."""
        return self.repos.setdefault(repo_id, Repo()).put(Commit.of(folder), *(refs or ("main",)))

    def cut(self, file: str, *, times: float = 1, after: int = 0, reset: bool = False) -> None:
        """Drop the connection after that many bytes of a file's body, the next `times` times it is sent.

        A dropped connection ends in silence (FIN); with `reset` the peer is told so (RST).
        """
        self._cuts[file] = _Cut(times, after, reset)

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        """What a client process needs in its environment, to be put on top of `os.environ`."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**ours, "NO_PROXY": "127.0.0.1,localhost", **extra}

    def run(
        self, command: Sequence[str], home: Path, *, cwd: Path | None = None, stdin: str = "", **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a client process, without what this one knows of another Hub; nothing that it says holds a token."""
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "HUGGING", "http"))}
        ours = {"PYTHONPATH": str(SOURCE), "COLUMNS": "200", **self.env(home, **extra)}
        done = subprocess.run(
            command, env=inherited | ours, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=PATIENCE
        )
        assert not any(token in done.stdout + done.stderr for token in (GOOD_TOKEN, STRANGER_TOKEN))
        return done

    def fetched(self, name: str = "") -> list[str]:
        """The files whose content was sent (once per GET), of those whose path ends with `name`."""
        return [r.file for r in self.requests if r.kind == "content" and r.file is not None and r.file.endswith(name)]

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What a repository holds on its main branch."""
        commit: Any = self.repos[repo_id].commit("main")
        return {path: file.content for path, file in commit.files.items()}

    def clear(self) -> None:
        """Forget the requests so far."""
        with self._lock:
            self.requests.clear()

    def close(self) -> None:
        """Stop. Fails if a handler failed."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._folder.cleanup()
        assert not self._server.failures, self._server.failures

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Called by the handlers' threads.

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    @contextlib.contextmanager
    def sending(self, file: str) -> Iterator[_Cut | None]:
        """While a file is on its way, which begins with as many others as have to be; gives how it has to break off."""
        with self._lock:
            self._underway += 1
            if self._underway >= self.together:
                self._met.set()
            cut = self._cuts.get(file)
            if cut is not None:
                cut.times -= 1
        try:
            assert self._met.wait(PATIENCE), f"never {self.together} at one time"
            yield cut if cut is not None and cut.times >= 0 else None
        finally:
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
        super().__init__(("127.0.0.1", 0), Handler)

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
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def do_GET(self) -> None:
        """Answers a request of any method; slashes in a revision are quoted."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, kind = urlsplit(self.path).path, "other"
        try:
            if self.hub.outage is not None:
                raise Refusal(self.hub.outage, None, "out of order")
            for pattern, method in _ROUTES.items():
                if found := re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}"):
                    kind = "upload" if self.command == "POST" else "other"
                    parts = [unquote(part or "main").removeprefix("models/") for part in found.groups()]
                    return method(self, *parts)
            raise Refusal(404, None, "not served here")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            headers |= {} if refusal.code is None else {"X-Error-Code": refusal.code}
            headers |= {} if refusal.commit is None else {"X-Repo-Commit": refusal.commit}
            self._json({"error": refusal.message}, kind, headers, refusal.status)

    do_HEAD = do_POST = do_GET

    # ---- reading

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

    def _list(self) -> None:
        """Models of an owner whose ids contain a text, as `list_models` asks for them."""
        asked = dict(parse_qsl(urlsplit(self.path).query))
        mine = [name for name in sorted(self.hub.repos) if name.startswith(f"{asked.get('author', '')}/")]
        found = [name for name in mine if asked.get("search", "").lower() in name.lower()]
        seen = [name for name in found if not self.hub.repos[name].private or self.token == GOOD_TOKEN]
        self._page([{"id": name, "sha": self.hub.repos[name].refs.get("main")} for name in seen], "list")

    def _info(self, repo_id: str, revision: str) -> None:
        repo, commit = self._find(repo_id, revision)
        told = {"id": repo_id, "sha": commit.sha, "private": repo.private, "gated": "manual" if repo.gated else False}
        siblings = [{"rfilename": path} for path in commit.files]
        self._json({**told, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}, "info")

    def _tree(self, repo_id: str, revision: str) -> None:
        _, commit = self._find(repo_id, revision)
        self._page([file.entry() for file in commit.files.values()], "tree")

    def _page(self, entries: list[dict[str, Any]], kind: str) -> None:
        """The page of the entries that is asked for, and where the next one is."""
        url = urlsplit(self.path)
        asked, size = dict(parse_qsl(url.query)), self.hub.page_size
        page = int(asked.get("cursor", "0"))
        link = f'<{self.hub.url}{url.path}?{urlencode({**asked, "cursor": page + 1})}>; rel="next"'
        more = (page + 1) * size < len(entries)
        self._json(entries[page * size : (page + 1) * size], kind, {"Link": link} if more else None)

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
            "X-Linked-Size": str(len(file.content)),
            "X-Linked-Etag": f'"{file.etag}"',
        }
        self._start(302, headers, 0)
        self._record("resolve", path)

    def _stored(self, repo_id: str, sha: str, path: str) -> None:
        self._content(self.hub.repos[repo_id].commits[sha].files[path])

    def _content(self, file: RepoFile, commit: str | None = None) -> None:
        body, status, size = file.content, 200, len(file.content)
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if commit is not None:
            headers["X-Repo-Commit"] = commit
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(wanted[1]), int(wanted[2] or size - 1)
            if begin >= size:
                raise Refusal(416, None, "Range not satisfiable")
            body, status = body[begin : end + 1], 206
            headers["Content-Range"] = f"bytes {begin}-{end}/{size}"
        if self.command == "HEAD":
            self._start(status, headers, len(body))
            return self._record("resolve", file.path)
        self._record("content", file.path)
        with self.hub.sending(file.path) as cut:
            self._start(status, headers, len(body))
            self.wfile.write(body if cut is None else body[: cut.after])
            if cut is not None:
                self._break_off(cut)

    def _break_off(self, cut: _Cut) -> None:
        self.wfile.flush()
        if cut.reset:
            time.sleep(0.2)  # a reset throws away what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    # ---- writing

    def _writer(self) -> None:
        if self.token is None:
            raise Refusal(401, None, "Invalid username or password.")
        if self.token != GOOD_TOKEN:
            raise Refusal(403, None, "Forbidden: you don't have the rights to write here")

    def _create(self) -> None:
        self._writer()
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self._json({**url, "error": "You already created this model repo"}, "upload", status=409)
        self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        self.hub.repos[repo_id].put(Commit.holding([]), "main")
        self._json(url, "upload")

    def _validate(self) -> None:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], flags=re.DOTALL)
        base = (yaml.safe_load(head[1]) if head else {}).get("base_model")
        wrong = base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base)
        errors = [{"message": f'"base_model" with value "{base}" is not valid'}] if wrong else []
        self._json({"errors": errors, "warnings": []}, "upload", status=400 if wrong else 200)

    def _preupload(self, repo_id: str, revision: str) -> None:
        self._writer()
        _, commit = self._find(repo_id, revision)
        known = {path: file.blob_id for path, file in commit.files.items()}
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        how = {"uploadMode": "regular", "shouldIgnore": False}
        self._json({"files": [{"path": path, "oid": known.get(path), **how} for path in paths]}, "upload")

    def _commit(self, repo_id: str, revision: str) -> None:
        self._writer()
        repo, before = self._find(repo_id, revision)
        header, *sent = map(json.loads, self.body.splitlines())
        files = dict(before.files)
        for line in sent:
            if line["key"] == "deletedFile":
                del files[line["value"]["path"]]
                continue
            path, content = line["value"]["path"], base64.b64decode(line["value"]["content"])
            place = self.hub.store / hashlib.sha256(content).hexdigest()
            place.write_bytes(content)
            files[path] = RepoFile(path, place)
        self.hub.received.append((header["value"]["summary"], [line["value"]["path"] for line in sent]))
        sha = repo.put(Commit.holding(files.values()), revision)
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url}, "upload")

    # ---- answers

    def _json(self, value: Any, kind: str, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._start(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)
        self._record(kind, None)

    def _start(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _record(self, kind: str, file: str | None) -> None:
        self.hub.record(Request(self.path, kind, file, self.token))


_API, _REPO = r"/api/((?:models|datasets)/[^/]+/[^/]+)", r"/((?:datasets/)?[^/]+/[^/]+)"
_ROUTES: dict[str, Any] = {
    r"GET /api/models": Handler._list,
    rf"GET {_API}(?:/revision/([^/]+))?": Handler._info,
    rf"GET {_API}/tree/([^/]+)": Handler._tree,
    rf"GET {_REPO}/resolve/([^/]+)/(.+)": Handler._resolve,
    rf"GET /cdn{_REPO}/([^/]+)/(.+)": Handler._stored,
    r"POST /api/repos/create": Handler._create,
    r"POST /api/validate-yaml": Handler._validate,
    rf"POST {_API}/preupload/([^/]+)": Handler._preupload,
    rf"POST {_API}/commit/([^/]+)": Handler._commit,
}
