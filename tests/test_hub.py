"""The real huggingface_hub client, in processes of its own, against a real server (`hub_server.py`): downloads, and
pools of many repositories and of manifests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from hub_server import FOREVER, GOOD_TOKEN, STRANGER_TOKEN, HubServer
from logo.cli.app import app
from logo.cli.options import EngineOptions
from logo.errors import HubError, UsageError
from logo.hub import check_revision, clean_subfolder, hub_error, is_hub_id
from make_adapters import CONFIG, PICKLE, SAFETENSORS, tensors, write
from warm import python

pytestmark = pytest.mark.slow

AGAIN = "run the same command again: finished files are kept and only the rest is fetched"
BIG = 1_600_000  # columns: 12.8 MB, more than the 10 MiB that huggingface_hub reads (and can resume) at a time

DOWNLOADS = """
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
SMALL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))\n" + DOWNLOADS

POOLS = """
import json, sys, warnings
warnings.filterwarnings("error", module=r"logo\b")
from logo import AdapterPool
from logo.errors import LoGoError
for call in json.load(sys.stdin):
    try:
        if "add" in call:
            pool = AdapterPool().add(call["add"])
        else:
            pool = AdapterPool.open(call.pop("places"), progress=False, **call)
        answer = {"names": list(pool.names), "refused": {bad.name: bad.reason for bad in pool.refused},
                  "sha256": pool.sha256(), "acting": [str(one.activation) for one in pool]}
    except LoGoError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


def client(
    hub: HubServer, home: Path, script: str, *calls: Any, words: Sequence[str] = (sys.executable,), **env: str
) -> tuple[list[Any], str]:
    """What a process of its own answers to these calls, which are downloads or pools, and what it says besides."""
    done = hub.run([*words, "-c", script], home, stdin=json.dumps(calls), **env)
    assert done.returncode == 0, done.stderr
    answers = [SimpleNamespace(**{"error": None, "message": "", **json.loads(one)}) for one in done.stdout.splitlines()]
    assert len(answers) == len(calls)
    assert all("\n" not in answer.message and len(answer.message) < 400 for answer in answers)
    return answers, done.stderr


def fetch(hub: HubServer, home: Path, call: dict[str, Any], **env: str) -> Any:
    return client(hub, home, DOWNLOADS, call, **env)[0][0]


def refusal(hub: HubServer, home: Path, call: dict[str, Any], **env: str) -> str:
    answer = fetch(hub, home, call, **env)
    assert answer.error == "HubError", answer
    return answer.message


def opened(hub: HubServer, home: Path, *calls: dict[str, Any], **env: str) -> list[Any]:
    return client(hub, home, POOLS, *calls, words=python(), **env)[0]


def contents(folder: str | Path) -> list[str]:
    folder = Path(folder)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_adapter(folder: Path, value: float, *, columns: int = 4, weights: str = SAFETENSORS, **more: Any) -> None:
    """A PEFT folder of rank 2; `value` makes its files differ from other adapters' (equal files are stored once)."""
    made = {key: tensor.fill_(value) for key, tensor in tensors({"layers.0.self_attn.q": (columns, 4)}, rank=2).items()}
    write(folder, made, r=2, lora_alpha=4 + value, **more)
    if weights != SAFETENSORS:
        (folder / SAFETENSORS).unlink()
    if weights == PICKLE:
        (folder / PICKLE).write_bytes(b"never unpickled %f" % value)


def pair(*folders: str) -> list[str]:
    return sorted(f"{folder}/{name}" for folder in folders for name in (CONFIG, SAFETENSORS))


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
    write_adapter(root / "pickled" / "only", 93, weights=PICKLE)
    write_adapter(root / "empty", 94, weights="none")
    write_adapter(root / "both", 95)
    (root / "both" / PICKLE).write_bytes(b"never unpickled")
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


def test_every_adapter_of_a_folder_is_fetched_once_and_in_parallel(hub: HubServer, pool: Path, tmp_path: Path) -> None:
    hub.together = 2
    call = {"repo_id": "org/pool", "subfolder": "./tasks//", "progress": False}
    [answer], said = client(hub, tmp_path, DOWNLOADS, call)
    folder = Path(answer.folder)
    assert contents(answer.folder) == pair(*TASKS) and folder.name == "tasks" and tmp_path in folder.parents
    for name in contents(folder):
        assert (folder / name).read_bytes() == (pool / "tasks" / name).read_bytes()
    assert sorted(hub.fetched()) == [f"tasks/{name}" for name in pair(*TASKS)]
    assert sum(request.kind == "tree" for request in hub.requests) > 5 and said == ""


def test_revisions_are_commits_branches_and_tags(pool: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_adapter(first / "a", 1)
    write_adapter(second / "a", 2)
    with HubServer({}) as hub:
        old = hub.add("org/moving", first, "main", "v1.0", "refs/pr/3")
        new = hub.add("org/moving", second, "main")
        revisions = [None, "v1.0", "refs/pr/3", old, new]
        calls = [{"repo_id": "org/moving", "revision": revision} for revision in revisions]
        answers, _ = client(hub, tmp_path / "home", DOWNLOADS, *calls)
    values = [load_file(Path(answer.folder, "a", SAFETENSORS)) for answer in answers]
    assert [next(iter(tensors.values()))[0, 0] for tensors in values] == [2, 1, 1, 1, 2]


def test_what_was_downloaded_works_without_a_connection(hub: HubServer, tmp_path: Path) -> None:
    call = {"repo_id": "org/pool", "subfolder": "tasks/flan"}
    online = fetch(hub, tmp_path, call)
    hub.clear()
    assert fetch(hub, tmp_path, call, HF_HUB_OFFLINE="1").folder == online.folder
    assert fetch(hub, tmp_path, {**call, "local_files_only": True}).folder == online.folder
    assert [request for request in hub.requests if "agent" not in request.path] == []
    # Offline, a part that was not fetched is an error, not a pool of what happens to be there.
    calls = [{"repo_id": "org/pool", "subfolder": folder} for folder in ("tasks", "")]
    expected = f"Hub repo org/pool: offline, and its cached copy is incomplete; with a connection, {AGAIN}"
    assert [one.message for one in client(hub, tmp_path, DOWNLOADS, *calls, HF_HUB_OFFLINE="1")[0]] == 2 * [expected]


def test_a_copy_that_other_tools_left_is_not_taken_for_the_whole(hub: HubServer, tmp_path: Path) -> None:
    script = f"""
import huggingface_hub
for name in ("{CONFIG}", "{SAFETENSORS}"):
    huggingface_hub.hf_hub_download("org/pool", f"tasks/flan/cot/ecqa/{{name}}")
"""
    client(hub, tmp_path, script)
    call = {"repo_id": "org/pool", "subfolder": "tasks"}
    message = refusal(hub, tmp_path, call, HF_HUB_OFFLINE="1")
    assert "LoGo cannot tell whether its cached copy is complete" in message
    assert contents(Path(message.rpartition(": ")[2], "tasks")) == pair("flan/cot/ecqa")
    assert contents(fetch(hub, tmp_path, call).folder) == pair(*TASKS)


def test_gated(pool: Path, tmp_path: Path) -> None:
    call = {"repo_id": "org/gated", "subfolder": "weird"}
    with HubServer({"org/gated": pool}, gated=["org/gated"]) as hub:
        tokens = (None, STRANGER_TOKEN, "revoked-token", f"{GOOD_TOKEN}\n", True)
        refused, _ = client(hub, tmp_path, DOWNLOADS, *({**call, "token": token} for token in tokens))
        member, again = (fetch(hub, tmp_path, call, HF_TOKEN=token) for token in (GOOD_TOKEN, STRANGER_TOKEN))
        content = [request for request in hub.requests if request.path.startswith("/cdn/")]
    accept = f"accept the licence at {hub.url}/org/gated"
    log_in = "set HF_TOKEN, or run `hf auth login`"
    anonymous, stranger, invalid, broken, none = refused
    assert anonymous.message == f"Hub repo org/gated: access is gated; {accept} and {log_in}"
    assert accept in stranger.message and "not on the list" in stranger.message and log_in in stranger.message
    assert "does not accept this token" in invalid.message and "revoked" not in invalid.message
    assert "could not be formed" in broken.message and "check HF_TOKEN" in broken.message
    assert "hf auth login" in none.message
    assert {answer.error for answer in refused} == {"HubError"}
    assert contents(member.folder) == [CONFIG, SAFETENSORS]
    assert again.folder == member.folder  # cached: which huggingface_hub serves without asking for the files again
    assert [request.token for request in content] == [None], "the token belongs to the Hub, not to its storage"


def test_what_does_not_exist(pool: Path, tmp_path: Path) -> None:
    repos = {"org/pool": pool, "org/private": pool}
    cases = [
        ({"repo_id": "org/nope"}, "not found at {url} (nor is it a local folder); check the name or, if it is private"),
        ({"repo_id": "org/nope", "token": GOOD_TOKEN}, "not found at {url}"),
        ({"repo_id": "org/private"}, "if it is private, set HF_TOKEN, or run `hf auth login`"),
        ({"repo_id": "org/private", "token": STRANGER_TOKEN}, "if it is private, set HF_TOKEN"),
        ({"repo_id": "org/pool", "revision": "v9"}, "no revision 'v9'; see the branches, tags and commits at {url}"),
        ({"repo_id": "org/pool", "revision": "f" * 40}, f"no revision '{'f' * 40}'"),
    ]
    with HubServer(repos, private=["org/private"]) as hub:
        answers, said = client(hub, tmp_path, DOWNLOADS, *({**call, "progress": False} for call, _ in cases))
        assert fetch(hub, tmp_path, {"repo_id": "org/private", "subfolder": "weird", "token": GOOD_TOKEN}).folder
    for (call, expected), answer in zip(cases, answers, strict=True):
        assert answer.error == "HubError", call
        assert answer.message.startswith(f"Hub repo {call['repo_id']}: ")
        assert expected.format(url=hub.url) in answer.message
    assert "No files matched" not in said


def test_a_download_that_fails_is_finished_by_the_next_one(big: Path, tmp_path: Path) -> None:
    large, small = (f"{name}/{SAFETENSORS}" for name in ("large", "small"))
    call = {"repo_id": "org/big"}
    with HubServer({"org/big": big}) as hub:
        hub.cut(large, times=FOREVER, after=0)
        dropped = refusal(hub, tmp_path, call)
        assert hub.fetched(small) == [small]
        assert len(hub.fetched(large)) > 1, "huggingface_hub tries again before it gives up"
        incomplete = refusal(hub, tmp_path, {**call, "local_files_only": True})
        hub.cut(large, after=4_000_000, reset=True)
        reset = refusal(hub, tmp_path, call)
        hub.clear()
        answer = fetch(hub, tmp_path, call)
        assert hub.fetched() == [large]
    assert dropped == f"Hub repo org/big: the connection to {hub.url} was lost (RemoteProtocolError); {AGAIN}"
    assert "cached copy is incomplete" in incomplete
    assert f"was lost (ReadError); {AGAIN}" in reset
    assert contents(answer.folder) == pair("large", "small")


def test_a_hub_that_is_not_there_or_is_none(hub: HubServer, tmp_path: Path) -> None:
    call = {"repo_id": "org/pool"}
    with HubServer({}) as closed:
        pass
    answer = fetch(closed, tmp_path, call)
    reach = f"{closed.url} cannot be reached (ConnectError), and there is no local folder of that name"
    todo = f"check the path, or the connection and HF_ENDPOINT, then {AGAIN}"
    assert answer.message == f"Hub repo org/pool: {reach}; {todo}"
    assert answer.slept == 0, "no retries: huggingface_hub falls back to the cache at once"
    nonsense = refusal(hub, tmp_path, call, HF_ENDPOINT=hub.url.removeprefix("http://"))
    assert "(UnsupportedProtocol); check HF_TOKEN and HF_ENDPOINT" in nonsense
    told = f"{hub.url} answered with HTTP status 503; wait, then {AGAIN}"
    for status, said in ((503, told), (429, "too many requests")):
        hub.outage = status
        assert said in refusal(hub, tmp_path, call)


def test_a_full_disk_and_a_cache_that_cannot_be_written(big: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file where the cache should be", encoding="utf-8")
    with HubServer({"org/big": big}) as hub:
        [full], _ = client(hub, tmp_path, SMALL_DISK, {"repo_id": "org/big"})
        blocked = refusal(hub, tmp_path, {"repo_id": "org/big", "cache_dir": str(occupied)})
        elsewhere = fetch(hub, tmp_path, {"repo_id": "org/big", "cache_dir": str(tmp_path / "elsewhere")})
    assert full.error == "HubError"
    assert "the cache cannot be used" in full.message and "File too large" in full.message and AGAIN in full.message
    assert "the cache cannot be used" in blocked and str(occupied) in blocked and "set HF_HOME" in blocked
    assert tmp_path / "elsewhere" in Path(elsewhere.folder).parents


def test_a_path_out_of_the_repository_or_the_cache_is_refused() -> None:
    for check, texts, said in (
        (clean_subfolder, ["/etc", "../up", "a/../../b", "a\\b", "..", "a/b\n"], "is not a folder inside it"),
        (check_revision, ["", "../../main", "/main", "a b", "v1\n", "a..b"], "is not a branch, a tag or a commit"),
    ):
        for text in texts:
            with pytest.raises(UsageError, match=rf"^Hub repo org/name: .* {said}"):
                check("org/name", text)


def test_what_is_no_repo_id() -> None:
    for text in ("", "name", "a/b/c", "../b", "a/..", "a--b/c", "a/b.git", "a/b c", "a/b\n", "-a/b"):
        assert not is_hub_id(text)


def test_an_unknown_error_is_one_line_without_secrets() -> None:
    for said, told in {
        "CAS said\nno: Bearer hf_SECRET": "CAS said",
        "GET https://cas/x?X-Signature=SECRET with 'Bearer SECRET' or hf_SECRET failed": (
            "GET https://cas/x... with '...' or ... failed"
        ),
    }.items():
        assert str(hub_error("org/pool", RuntimeError(said))) == f"Hub repo org/pool: RuntimeError: {told}"
    assert isinstance(hub_error("org/pool", RuntimeError()), HubError)


# Pools of many repositories, and manifests


@pytest.fixture
def library(tmp_path: Path) -> Iterator[HubServer]:
    """An owner with a repository for each adapter, and a library with many in one."""
    made = tmp_path / "made"
    for value, task in enumerate(("arc", "boolq", "sum.v2"), 1):
        write_adapter(made / task, value)
    write_adapter(made / "nested" / "default", 5)
    write_adapter(made / "pickled", 6, weights=PICKLE)
    (made / "nothing").mkdir()
    (made / "nothing" / "README.md").write_text("no adapter")
    for value, task in enumerate(("answerability", "citations"), 10):
        write_adapter(made / "library" / task / "lora", 10 * value)
        write_adapter(made / "library" / task / "alora", 10 * value + 1, alora_invocation_tokens=[3, 4])
    repos = {f"org/base_lora-{name}": made / name for name in ("arc", "boolq", "sum.v2", "nested", "pickled")}
    repos |= {"org/other": made / "arc", "another/base_lora-arc": made / "arc", "org/library": made / "library"}
    repos |= {"org/base_lora-gated": made / "arc", "org/base_lora-nothing": made / "nothing"}
    with HubServer(repos, gated=["org/base_lora-gated"], page_size=3) as server:
        yield server


def test_a_manifest_of_all_repositories_that_are_called_so(library: HubServer, tmp_path: Path) -> None:
    """It gives the same bytes later, without asking the Hub, or says what changed."""
    home = tmp_path / "home"

    def lock(*arguments: str) -> subprocess.CompletedProcess[str]:
        return library.run([*python(), "-m", "logo.cli", "pool", "lock", *arguments], home, cwd=tmp_path)

    write_adapter(tmp_path / "mine" / "french", 50)
    (tmp_path / "pools").mkdir()
    line = ("org/base_lora-*", "mine", "--save", "pools/all.yaml")
    strict = lock(*line)
    assert strict.returncode == 1 and "access is gated" in strict.stderr
    done = lock(*line, "--on-bad-adapter", "skip")
    assert done.returncode == 0, done.stderr
    assert "pools/all.yaml: 5 adapters, 4 commits" in done.stdout
    for name, reason in {
        "gated": "access is gated",
        "nothing": "no adapters in org/base_lora-nothing@",
        "pickled": f"{SAFETENSORS} is missing",
    }.items():
        assert f"refused org/base_lora-{name}" in done.stderr and reason in done.stderr
    entries = {one["name"]: one for one in yaml.safe_load((tmp_path / "pools" / "all.yaml").read_text())["adapters"]}
    assert entries["french"]["source"] == "../mine/french" and "revision" not in entries["french"]
    nested = entries["org/base_lora-nested/default"]
    assert nested["source"] == "org/base_lora-nested/default"
    assert nested["revision"] == library.repos["org/base_lora-nested"].refs["main"]

    manifest = str(tmp_path / "pools" / "all.yaml")
    [live] = opened(library, home, {"places": manifest})
    assert live.names == sorted(entries) and not live.refused
    library.add("org/base_lora-arc", tmp_path / "made" / "boolq")  # what moved on does not matter
    shutil.rmtree(home)
    [again] = opened(library, home, {"places": manifest})
    assert again == live
    library.clear()
    assert opened(library, home, {"places": manifest}, HF_HUB_OFFLINE="1") == [live] and not library.requests
    for blob in (home / "hub").glob("models--org--base_lora-boolq/blobs/*"):
        blob.write_bytes(blob.read_bytes() + b" ")
    [damaged] = opened(library, home, {"places": manifest, "on_bad_adapter": "skip"})
    assert list(damaged.refused) == ["org/base_lora-boolq"] and "org/base_lora-boolq" not in damaged.names
    nobody = lock("org/zzz-*", "--save", "none.yaml")
    assert nobody.returncode == 1 and "no repository matches" in nobody.stderr


def test_a_pool_is_never_smaller_because_a_connection_broke(library: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    places = ["org/base_lora-arc", "org/base_lora-nested", "org/base_lora-gated"]
    [whole] = opened(library, home, {"places": places, "on_bad_adapter": "skip"})
    assert whole.names == places[:1] + ["org/base_lora-nested/default"]
    assert list(whole.refused) == ["org/base_lora-gated"]  # for a reason of its own
    shutil.rmtree(home)
    library.cut(f"default/{SAFETENSORS}", times=FOREVER)
    [broken] = opened(library, home, {"places": places, "on_bad_adapter": "skip"})
    assert broken.error == "HubError" and "the connection to" in broken.message, broken


def test_a_library_has_plain_and_activated_forms(library: HubServer, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "pool.json").write_text('{"activation": "last:9"}')  # above every repository, so of none
    (tmp_path / "made" / "library" / "pool.json").write_text('{"activation": "last:3"}')
    library.add("org/library", tmp_path / "made" / "library")
    everything, activated, none, deep, added, plain = opened(
        library,
        tmp_path / "home",
        {"places": "org/library"},
        {"places": "org/library/citations/alora"},
        {"places": "org/library/gone"},
        {"places": "org/library/citations/lora"},
        {"add": "org/library/answerability/lora"},
        {"places": "org/base_lora-arc"},
    )
    assert everything.acting == ["last:3", "last:3"] and deep.acting == added.acting == ["last:3"]
    assert plain.acting == ["everywhere"]
    assert everything.names == ["answerability/lora", "citations/lora"]
    assert "activated form of 'citations/lora'" in everything.refused["citations/alora"]
    assert activated.names == ["alora"] and activated.acting == ["invocation"]
    assert none.error == "StorageError" and "no adapters in org/library/gone: No such file" in none.message


def test_adapters_are_named_after_their_places_and_several_stand_in_front(library: HubServer, tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine" / "french", 50)
    places = [str(tmp_path / "mine"), "org/base_lora-arc", "org/library/citations"]
    one, added, many, listed, text, gone, clash = opened(
        library,
        tmp_path / "home",
        {"places": "org/other"},
        {"add": "org/library/citations/lora@main"},
        {"add": "org/library"},
        {"places": places},
        {"places": ",".join(places)},
        {"places": [*places, "org/none"]},
        {"places": [str(tmp_path / "mine"), str(tmp_path / "mine" / ".." / "mine")]},
    )
    assert listed.names == ["french", "org/base_lora-arc", "org/library/citations/lora"]
    assert text == listed
    assert (one.names, added.names) == (["org/other"], ["org/library/citations/lora"])
    assert many.error == "AdapterError" and f"{CONFIG} is missing" in many.message
    assert gone.error == "HubError" and "org/none" in gone.message
    assert clash.error == "PoolError" and "has the same name" in clash.message


def test_a_manifest_by_hand(library: HubServer, tmp_path: Path) -> None:
    """What one repository holds is fetched in one go, and both forms, since each is named."""
    write_adapter(tmp_path / "french", 50)
    pool = tmp_path / "pool.yml"
    pool.write_text(
        "adapters:\n- org/base_lora-arc\n- ./french\n- {source: org/base_lora-gated}\n- org/library/citations/alora\n"
        "- {source: org/library/citations/lora, name: cite}\n- {source: org/library/nowhere, name: x}\n"
    )
    home = tmp_path / "home"
    strict, skipping = opened(library, home, {"places": str(pool)}, {"places": str(pool), "on_bad_adapter": "skip"})
    assert strict.error == "HubError" and "access is gated" in strict.message
    assert skipping.names == ["cite", "french", "org/base_lora-arc", "org/library/citations/alora"]
    assert sorted(skipping.refused) == ["org/base_lora-gated", "x"] and "no adapters" in skipping.refused["x"]
    assert len([file for file in library.fetched(".safetensors") if "citations" in file]) == 2


def test_the_command_line_takes_the_option_again() -> None:
    for places, expected in (([], None), (["a"], "a"), (["a", "org/b,c"], "a,org/b,c")):
        words = ["select", "x", *(word for place in places for word in ("--adapters", place))]
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert bound.arguments.get("engine", EngineOptions()).sources == expected
