"""The Hub of `hub_server`, to which files can be sent as well: repositories made, large files stored, commits.

Speaks what huggingface_hub asks for without Xet (`HF_HUB_DISABLE_XET=1`): `repos/create`, `validate-yaml`, `preupload`,
Git LFS's batch, upload and verify, and `commit`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from hub_server import GOOD_TOKEN, LARGE, Commit, Handler, HubServer, Refusal, Repo, RepoFile


class WritingHandler(Handler):
    """Takes files of whoever has the good token."""

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        try:
            if self.hub.outage is not None:
                raise Refusal(self.hub.outage, None, "out of order")
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, path):
                    method(self, body, *found.groups())
                    return
            raise Refusal(404, None, "not served here")
        except Refusal as refusal:
            self._refuse(refusal, "upload")

    def _may_write(self, repo_id: str) -> Repo:
        if self.token is None:
            raise Refusal(401, None, "Invalid username or password.")
        if self.token != GOOD_TOKEN:
            raise Refusal(403, None, "Forbidden: you don't have the rights to write here")
        if repo_id not in self.hub.repos:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.hub.repos[repo_id]

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if self.token is None:
            raise Refusal(401, None, "Invalid username or password.")
        if self.token != GOOD_TOKEN:
            raise Refusal(403, None, "Forbidden: no rights in this namespace")
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            self._json({**url, "error": "You already created this model repo"}, "upload", status=409)
            return
        empty = Commit("0" * 40, {})
        private = asked.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo({empty.sha: empty}, {"main": empty.sha}, private=private)
        self._json(url, "upload")

    def _validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        data = yaml.safe_load(head[1]) if head else {}
        base = data.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors = [{"message": f'"base_model" with value "{base}" is not valid'}]
            self._json({"errors": errors, "warnings": []}, "upload", status=400)
            return
        self._json({"errors": [], "warnings": []}, "upload")

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        commit = self._may_write(repo_id).commit(revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": commit.files[file["path"]].etag if commit and file["path"] in commit.files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files}, "upload")

    def _batch(self, body: bytes, repo_id: str) -> None:
        self._may_write(repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.store / asked["oid"]).is_file():
                upload = {"href": f"http://localhost:{self.hub.port}/lfs/{asked['oid']}"}
                verify = {"href": f"{self.hub.url}/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects}, "upload")

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, None, "not the file that was announced")
        (self.store / oid).write_bytes(body)
        self.hub.received.append(oid)
        self._json({}, "upload")

    def _verify(self, body: bytes) -> None:
        asked = json.loads(body)
        file = self.store / asked["oid"]
        if not file.is_file() or file.stat().st_size != asked["size"]:
            raise Refusal(404, None, "not stored")
        self._json({}, "upload")

    def _commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._may_write(repo_id)
        before = repo.commit(revision)
        files = dict(before.files) if before else {}
        title = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = self._kept(value["path"], content)
            elif line["key"] == "lfsFile":
                files[value["path"]] = RepoFile(value["path"], self.store / value["oid"])
            else:
                raise Refusal(400, None, f"{line['key']} is not known here")
        text = "".join(f"{name} {files[name].blob_id}\n" for name in sorted(files))
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), dict(sorted(files.items())))
        repo.commits[commit.sha] = commit
        repo.refs[revision] = commit.sha
        self.hub.messages.append(title)
        url = f"{self.hub.url}/{repo_id}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url}, "upload")

    def _kept(self, path: str, content: bytes) -> RepoFile:
        place = self.store / hashlib.sha256(content).hexdigest()
        place.write_bytes(content)
        return RepoFile(path, place)

    @property
    def hub(self) -> WritableHub:
        hub = self.server.hub
        assert isinstance(hub, WritableHub)
        return hub

    @property
    def store(self) -> Path:
        return self.hub.store


_ROUTES = (
    (r"/api/repos/create", WritingHandler._create),
    (r"/api/validate-yaml", WritingHandler._validate),
    (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", WritingHandler._preupload),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", WritingHandler._batch),
    (r"/lfs/verify", WritingHandler._verify),
    (r"/lfs/([0-9a-f]{64})", WritingHandler._put),
    (r"/api/models/([^/]+/[^/]+)/commit/(.+)", WritingHandler._commit),
)


class WritableHub(HubServer):
    """Attributes:
    store: the folder of all contents that were sent, by their sha256.
    received: the sha256 of every large file whose bytes were sent, in order.
    messages: of the commits.
    """

    handler = WritingHandler

    def __init__(self, repos: Mapping[str, Path] | None = None, *, private: Iterable[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.store = Path(self._folder.name)
        self.received: list[str] = []
        self.messages: list[str] = []
        super().__init__(repos or {}, private=private)

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        return super().env(home, HF_HUB_DISABLE_XET="1", **extra)

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What a repository holds on its main branch."""
        commit: Any = self.repos[repo_id].commit("main")
        return {path: file.source.read_bytes() for path, file in commit.files.items()}
