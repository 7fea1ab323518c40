"""The real huggingface_hub client, in processes of its own, against a real server (`hub_server.py`).

huggingface_hub reads its `HF_*` variables when it is imported, so every client is a subprocess that makes a list of
calls. None of them imports torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hub_server import FOREVER, GOOD_TOKEN, STRANGER_TOKEN, HubServer
from logo.errors import HubError, UsageError
from logo.hub import check_revision, clean_subfolder, hub_error, is_hub_id
from tolerances import PATIENCE

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parent.parent / "src"
AGAIN = "run the same command again: finished files are kept and only the rest is fetched"
BIG = 1_600_000  # columns: 12.8 MB, more than the 10 MiB that huggingface_hub reads (and can resume) at a time

CLIENT = """
import json, sys, time, warnings
warnings.filterwarnings("error", module=r"logo\b")
slept = []
sleep = time.sleep
time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))
from logo.adapters.sources import download_adapters
from logo.errors import LoGoError
from logo.hub import clean_subfolder
for call in json.load(sys.stdin):
    answer = {}
    slept.clear()
    try:
        repo, revision = call.pop("repo_id"), call.pop("revision", None)
        folder = clean_subfolder(repo, call.pop("subfolder", None))
        answer["folder"] = str(download_adapters(repo, [folder], revision=revision, **call) / folder)
    except LoGoError as error:
        answer.update(error=type(error).__name__, message=str(error))
    print(json.dumps(answer | {"slept": sum(slept)}), flush=True)
assert "torch" not in sys.modules
"""

# Fills the disk without filling the disk: no file may grow beyond 4 MB.
SMALL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))\n" + CLIENT


@dataclass(frozen=True)
class Answer:
    """What one call of `download_adapters` did."""

    slept: float
    folder: Path | None = None
    error: str | None = None
    message: str = ""

    @property
    def files(self) -> list[str]:
        assert self.folder is not None, self.message
        return contents(self.folder)


@dataclass(frozen=True)
class Run:
    """One client process."""

    answers: list[Answer]
    stderr: str


def run_client(env: dict[str, str], *calls: dict[str, Any], script: str = CLIENT) -> Run:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "http"))}
    process = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(calls),
        env=inherited | {"PYTHONPATH": str(SOURCE)} | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    answers = [Answer(**{**row, "folder": Path(row["folder"]) if "folder" in row else None}) for row in rows]
    assert len(answers) == len(calls)
    for answer in answers:
        assert "\n" not in answer.message and len(answer.message) < 400
        assert "token\n" not in answer.message and GOOD_TOKEN not in answer.message
        assert STRANGER_TOKEN not in answer.message
    return Run(answers, process.stderr)


def fetch(env: dict[str, str], **call: Any) -> Answer:
    return run_client(env, call).answers[0]


def refusal(env: dict[str, str], **call: Any) -> str:
    answer = fetch(env, **call)
    assert answer.error == "HubError", answer
    return answer.message


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_adapter(folder: Path, value: float = 0.0, *, columns: int = 4, weights: str = "safetensors") -> None:
    """A PEFT folder of rank 2; `value` makes its files differ from other adapters' (equal files are stored once)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4 + value, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    name = "base_model.model.model.layers.0.self_attn.q.lora_{}.weight"
    tensors = {
        name.format("A"): np.full((2, columns), value, np.float32),
        name.format("B"): np.full((4, 2), -value, np.float32),
    }
    if weights == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors")
    elif weights == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"never unpickled %f" % value)


def pair(*folders: str) -> list[str]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return sorted(f"{folder}/{name}" for folder in folders for name in names)


TASKS = ("arc.easy:v1.0", "flan/cot/ecqa", "flan/cot/gsm8k", "sst2 & more", "we[i]rd")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with adapters at several depths, under names of every kind, and other things beside them."""
    root = tmp_path_factory.mktemp("repo")
    for value, task in enumerate(TASKS, 1):
        write_adapter(root / "tasks" / task, value)
    (root / "tasks" / "flan" / "notes.md").write_text("not an adapter", encoding="utf-8")
    (root / "tasks" / "we[i]rd" / "optimizer.pt").write_bytes(b"not fetched")
    write_adapter(root / "tasks-2" / "lookalike", 91)
    write_adapter(root / "weird", 92)
    write_adapter(root / "pickled" / "only", 93, weights="pickle")
    write_adapter(root / "empty", 94, weights="none")
    write_adapter(root / "both", 95)
    write_adapter(root / "both", 95, weights="pickle")
    (root / "README.md").write_text("a pool", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("big")
    write_adapter(root / "large", 1, columns=BIG)
    write_adapter(root / "small", 2)
    return root


@pytest.fixture
def hub(pool: Path) -> Iterator[HubServer]:
    with HubServer({"org/pool": pool}, page_size=3) as server:
        yield server


# Downloads that succeed


def test_fetches_every_adapter_below_the_folder_once_and_in_parallel(
    hub: HubServer, pool: Path, tmp_path: Path
) -> None:
    hub.together = 2
    run = run_client(hub.env(tmp_path), {"repo_id": "org/pool", "subfolder": "./tasks//", "progress": False})
    (answer,) = run.answers
    assert answer.files == pair(*TASKS)
    assert answer.folder is not None and answer.folder.name == "tasks" and tmp_path in answer.folder.parents
    for name in answer.files:
        assert (answer.folder / name).read_bytes() == (pool / "tasks" / name).read_bytes()
    assert sorted(hub.fetched()) == [f"tasks/{name}" for name in pair(*TASKS)]
    assert hub.peak > 1
    assert sum(request.kind == "tree" for request in hub.requests) > 5
    assert run.stderr == ""


def test_revisions_are_commits_branches_and_tags(pool: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_adapter(first / "a", 1)
    write_adapter(second / "a", 2)
    with HubServer({}) as hub:
        old = hub.add("org/moving", first, "main", "v1.0", "refs/pr/3")
        new = hub.add("org/moving", second, "main")
        revisions = [None, "v1.0", "refs/pr/3", old, new]
        calls = [{"repo_id": "org/moving", "revision": revision} for revision in revisions]
        answers = run_client(hub.env(tmp_path / "home"), *calls).answers
    values = [load_file(answer.folder / "a/adapter_model.safetensors") for answer in answers if answer.folder]
    assert [next(iter(tensors.values()))[0, 0] for tensors in values] == [2, 1, 1, 1, 2]


# Without a connection


def test_what_was_downloaded_works_without_a_connection(hub: HubServer, tmp_path: Path) -> None:
    call = {"repo_id": "org/pool", "subfolder": "tasks/flan"}
    online = fetch(hub.env(tmp_path), **call)
    hub.clear()
    assert fetch(hub.env(tmp_path, HF_HUB_OFFLINE="1"), **call).folder == online.folder
    assert fetch(hub.env(tmp_path), **call, local_files_only=True).folder == online.folder
    assert [request for request in hub.requests if "agent" not in request.path] == []
    # Offline, a part that was not fetched is an error, not a pool of what happens to be there.
    offline = hub.env(tmp_path, HF_HUB_OFFLINE="1")
    calls = [{"repo_id": "org/pool", "subfolder": folder} for folder in ("tasks", "")]
    bigger, whole = run_client(offline, *calls).answers
    for answer in (bigger, whole):
        assert (
            answer.message
            == f"Hub repo org/pool: offline, and its cached copy is incomplete; with a connection, {AGAIN}"
        )


def test_a_copy_that_other_tools_left_is_not_taken_for_the_whole(hub: HubServer, tmp_path: Path) -> None:
    script = """
import huggingface_hub
for name in ("adapter_config.json", "adapter_model.safetensors"):
    huggingface_hub.hf_hub_download("org/pool", f"tasks/flan/cot/ecqa/{name}")
"""
    run_client(hub.env(tmp_path), script=script)
    message = refusal(hub.env(tmp_path, HF_HUB_OFFLINE="1"), repo_id="org/pool", subfolder="tasks")
    assert "LoGo cannot tell whether its cached copy is complete" in message
    snapshot = Path(message.rpartition(": ")[2])
    assert contents(snapshot / "tasks") == pair("flan/cot/ecqa")
    assert fetch(hub.env(tmp_path), repo_id="org/pool", subfolder="tasks").files == pair(*TASKS)


# What the Hub refuses


def test_gated(pool: Path, tmp_path: Path) -> None:
    call = {"repo_id": "org/gated", "subfolder": "weird"}
    with HubServer({"org/gated": pool}, gated=["org/gated"]) as hub:
        anonymous, stranger, invalid, broken, none = run_client(
            hub.env(tmp_path),
            call,
            *({**call, "token": token} for token in (STRANGER_TOKEN, "revoked-token", f"{GOOD_TOKEN}\n", True)),
        ).answers
        member, again = (fetch(hub.env(tmp_path, HF_TOKEN=token), **call) for token in (GOOD_TOKEN, STRANGER_TOKEN))
        content = [request for request in hub.requests if request.path.startswith("/cdn/")]
    accept = f"accept the licence at {hub.url}/org/gated"
    log_in = "set HF_TOKEN, or run `hf auth login`"
    assert anonymous.message == f"Hub repo org/gated: access is gated; {accept} and {log_in}"
    assert accept in stranger.message and "not on the list" in stranger.message and log_in in stranger.message
    assert "does not accept this token" in invalid.message and "revoked" not in invalid.message
    assert "could not be formed" in broken.message and "check HF_TOKEN" in broken.message
    assert "hf auth login" in none.message
    assert {answer.error for answer in (anonymous, stranger, invalid, broken, none)} == {"HubError"}
    assert member.files == ["adapter_config.json", "adapter_model.safetensors"]
    assert again.folder == member.folder  # cached: which huggingface_hub serves without asking for the files again
    assert [request.token for request in content] == [None], "the token belongs to the Hub, not to its storage"


def test_what_does_not_exist(pool: Path, tmp_path: Path) -> None:
    repos = {"org/pool": pool, "org/private": pool}
    cases = [
        ({"repo_id": "org/nope"}, "not found at {url} (nor is it a local folder); check the name or, if it is private"),
        ({"repo_id": "org/nope", "token": GOOD_TOKEN}, "not found at {url}"),
        ({"repo_id": "org/private"}, "if it is private, set HF_TOKEN, or run `hf auth login`"),
        ({"repo_id": "org/private", "token": STRANGER_TOKEN}, "if it is private, set HF_TOKEN"),
        (
            {"repo_id": "org/pool", "revision": "v9"},
            "no revision 'v9'; see the branches, tags and commits at {url}/org/",
        ),
        ({"repo_id": "org/pool", "revision": "f" * 40}, f"no revision '{'f' * 40}'"),
    ]
    with HubServer(repos, private=["org/private"]) as hub:
        env = hub.env(tmp_path / "home")
        run = run_client(env, *({**call, "progress": False} for call, _ in cases))
        assert fetch(env, repo_id="org/private", subfolder="weird", token=GOOD_TOKEN).files
    for (call, expected), answer in zip(cases, run.answers, strict=False):
        assert answer.error == "HubError", call
        assert answer.message.startswith(f"Hub repo {call['repo_id']}: ")
        assert expected.format(url=hub.url) in answer.message
    assert "No files matched" not in run.stderr


# Connections that fail


def test_a_download_that_fails_is_finished_by_the_next_one(big: Path, tmp_path: Path) -> None:
    large, small = (f"{name}/adapter_model.safetensors" for name in ("large", "small"))
    with HubServer({"org/big": big}) as hub:
        env = hub.env(tmp_path)
        hub.cut(large, times=FOREVER, after=0)
        dropped = refusal(env, repo_id="org/big")
        assert hub.fetched("small/adapter_model.safetensors") == [small]
        assert len(hub.fetched(large)) > 1, "huggingface_hub tries again before it gives up"
        incomplete = refusal(env, repo_id="org/big", local_files_only=True)
        hub.cut(large, after=4_000_000, reset=True)
        reset = refusal(env, repo_id="org/big")
        hub.clear()
        answer = fetch(env, repo_id="org/big")
        assert hub.fetched() == [large]
    assert dropped == f"Hub repo org/big: the connection to {hub.url} was lost (RemoteProtocolError); {AGAIN}"
    assert "cached copy is incomplete" in incomplete
    assert f"was lost (ReadError); {AGAIN}" in reset
    assert answer.files == pair("large", "small")


def test_a_hub_that_is_not_there_or_is_none(hub: HubServer, tmp_path: Path) -> None:
    with HubServer({}) as closed:
        pass
    answer = fetch(closed.env(tmp_path), repo_id="org/pool")
    reach = f"{closed.url} cannot be reached (ConnectError), and there is no local folder of that name"
    todo = f"check the path, or the connection and HF_ENDPOINT, then {AGAIN}"
    assert answer.message == f"Hub repo org/pool: {reach}; {todo}"
    assert answer.slept == 0, "no retries: huggingface_hub falls back to the cache at once"
    nonsense = refusal(hub.env(tmp_path, HF_ENDPOINT=hub.url.removeprefix("http://")), repo_id="org/pool")
    assert "(UnsupportedProtocol); check HF_TOKEN and HF_ENDPOINT" in nonsense
    hub.outage = 503
    assert f"{hub.url} answered with HTTP status 503; wait, then {AGAIN}" in refusal(
        hub.env(tmp_path), repo_id="org/pool"
    )
    hub.outage = 429
    assert "too many requests" in refusal(hub.env(tmp_path), repo_id="org/pool")


def test_a_full_disk_and_a_cache_that_cannot_be_written(big: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file where the cache should be", encoding="utf-8")
    with HubServer({"org/big": big}) as hub:
        env = hub.env(tmp_path)
        (full,) = run_client(env, {"repo_id": "org/big"}, script=SMALL_DISK).answers
        blocked = refusal(env, repo_id="org/big", cache_dir=str(occupied))
        elsewhere = fetch(env, repo_id="org/big", cache_dir=str(tmp_path / "elsewhere"))
    assert full.error == "HubError"
    assert "the cache cannot be used" in full.message and "File too large" in full.message and AGAIN in full.message
    assert "the cache cannot be used" in blocked and str(occupied) in blocked and "set HF_HOME" in blocked
    assert elsewhere.folder is not None and tmp_path / "elsewhere" in elsewhere.folder.parents


# What needs no server


@pytest.mark.parametrize("subfolder", ["/etc", "../up", "a/../../b", "a\\b", "..", "a/b\n"])
def test_a_folder_outside_the_repository_is_refused(subfolder: str) -> None:
    with pytest.raises(UsageError, match=r"^Hub repo org/name: .* is not a folder inside it"):
        clean_subfolder("org/name", subfolder)


@pytest.mark.parametrize("revision", ["", "../../main", "/main", "a b", "v1\n", "a..b", "a\\b"])
def test_a_revision_that_git_would_refuse_is_refused(revision: str) -> None:
    with pytest.raises(UsageError, match="is not a branch, a tag or a commit"):
        check_revision("org/name", revision)


@pytest.mark.parametrize(
    "repo_id", ["", "name", "a/b/c", "../b", "a/..", "a--b/c", "a/b.git", "a/b c", "a/b\n", "-a/b"]
)
def test_what_is_no_repo_id(repo_id: str) -> None:
    assert not is_hub_id(repo_id)


def test_an_unknown_error_is_one_line_without_secrets() -> None:
    error = RuntimeError("CAS said\nno: Bearer hf_SECRET")
    assert str(hub_error("org/pool", error)) == "Hub repo org/pool: RuntimeError: CAS said"
    error = RuntimeError("GET https://cas/x?X-Signature=SECRET with 'Bearer SECRET' or hf_SECRET failed")
    assert (
        str(hub_error("org/pool", error))
        == "Hub repo org/pool: RuntimeError: GET https://cas/x... with '...' or ... failed"
    )
    assert isinstance(hub_error("org/pool", RuntimeError()), HubError)


POOLS = """
import json, sys
from logo import AdapterPool
from logo.errors import LoGoError
for call in json.load(sys.stdin):
    answer = {"slept": 0}
    try:
        if "add" in call:
            pool = AdapterPool().add(call["add"])
        else:
            pool = AdapterPool.open(call["repo_id"], progress=False, **call.get("options", {}))
        answer["message"] = " ".join([*pool.names, *(f"({error.name})" for error in pool.refused)])
    except LoGoError as error:
        answer.update(error=type(error).__name__, message=str(error))
    print(json.dumps(answer), flush=True)
"""


def test_pools_name_adapters_after_their_places(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", 1.0)
    for number, name in enumerate(("a", "b", "sub/c"), start=2):
        write_adapter(tmp_path / "many" / name, float(number))
    write_adapter(tmp_path / "bad", 5.0, weights="none")
    write_adapter(tmp_path / "bad" / "good", 6.0)
    repos = {"org/one": tmp_path / "one", "org/many": tmp_path / "many", "other/bad": tmp_path / "bad"}
    with HubServer(repos) as hub:
        calls: list[dict[str, Any]] = [
            {"repo_id": "org/one"},
            {"repo_id": "org/many"},
            {"repo_id": "other/bad", "options": {"on_bad_adapter": "skip"}},
            {"add": "org/one"},
            {"add": "org/many/sub/c@main"},
            {"add": "org/none"},
            {"add": "org/many"},
        ]
        answers = run_client(hub.env(tmp_path / "home"), *calls, script=POOLS).answers
    names = ["org/one", "a b sub/c", "good (other/bad)", "org/one", "org/many/sub/c"]
    assert [answer.message for answer in answers[:5]] == names
    assert all(answer.error is None for answer in answers[:5])
    assert answers[5].error == "HubError" and "org/none" in answers[5].message
    assert answers[6].error == "AdapterError" and "adapter_config.json is missing" in answers[6].message
