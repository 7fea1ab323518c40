"""Pools by name, opened from a real Hub server by processes of their own: many repositories, libraries, manifests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from hub_server import FOREVER, GOOD_TOKEN, HubServer
from logo import AdapterPool
from logo.cli.expanded import expanded
from logo.cli.options import EngineOptions
from logo.errors import UsageError
from test_hub import SOURCE, write_adapter
from tolerances import PATIENCE
from warm import python

pytestmark = pytest.mark.slow

CLIENT = """
import json, sys, warnings
warnings.filterwarnings("error", module=r"logo\\b")
from logo import AdapterPool
from logo.errors import LoGoError
for call in json.load(sys.stdin):
    try:
        pool = AdapterPool.open(call.pop("places"), progress=False, **call)
        answer = {"names": list(pool.names), "refused": {bad.name: bad.reason for bad in pool.refused},
                  "sha256": pool.sha256(), "acting": [str(one.activation) for one in pool]}
    except LoGoError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """What came of opening one pool."""

    names: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    acting: list[str] = field(default_factory=list)
    error: str | None = None
    message: str = ""


def environment(env: dict[str, str], home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "http"))}
    return inherited | {"PYTHONPATH": str(SOURCE), "LOGO_CACHE": str(home / "logo")} | env


def opened(env: dict[str, str], home: Path, *calls: dict[str, Any]) -> list[Answer]:
    done = subprocess.run(
        [*python(), "-c", CLIENT],
        input=json.dumps(calls),
        env=environment(env, home),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert GOOD_TOKEN not in done.stdout + done.stderr
    answers = [Answer(**json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls) and all("\n" not in answer.message for answer in answers)
    return answers


def command(env: dict[str, str], home: Path, *arguments: str, at: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python(), "-m", "logo.cli", *arguments],
        env=environment(env, home) | {"COLUMNS": "200"},
        cwd=at,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """Owners with a repository for each adapter, and libraries with many in one."""
    made = tmp_path / "made"
    for value, task in enumerate(("arc", "boolq", "copa", "sum.v2"), 1):
        write_adapter(made / task, value)
    write_adapter(made / "nested" / "default", 5)
    write_adapter(made / "pickled", 6, weights="pickle")
    (made / "nothing").mkdir()
    (made / "nothing" / "README.md").write_text("no adapter")
    for value, task in enumerate(("answerability", "citations"), 10):
        for more, base in enumerate(("granite-2b", "granite-8b")):
            for less, kind in enumerate(("lora", "alora")):
                folder = made / "library" / task / base / kind
                write_adapter(folder, 10 * value + 2 * more + less)
                if kind == "alora":
                    edit(folder, alora_invocation_tokens=[3, 4])
    names = ("arc", "boolq", "copa", "sum.v2", "nested", "pickled", "nothing")
    repos = {f"org/base_lora-{name}": made / name for name in names}
    repos |= {"org/other": made / "arc", "another/base_lora-arc": made / "arc", "org/library": made / "library"}
    repos["org/base_lora-gated"] = made / "copa"
    with HubServer(repos, gated=["org/base_lora-gated"], page_size=3) as server:
        yield server


TASKS = ["arc", "boolq", "copa", "nested", "sum.v2"]


def test_all_repositories_that_are_called_so(hub: HubServer, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "home")
    strict, skipping, again = opened(
        env,
        tmp_path,
        {"places": "org/base_lora-*"},
        *2 * [{"places": "org/base_lora-*", "on_bad_adapter": "skip"}],
    )
    assert strict.error == "PoolError" and "--on-bad-adapter skip" in strict.message
    assert skipping.names == TASKS and again == skipping
    assert set(skipping.refused) == {"gated", "nothing", "pickled"}
    for name, reason in {
        "gated": "access is gated",
        "nothing": "no adapter",
        "pickled": "pickled adapters only",
    }.items():
        assert reason in skipping.refused[name] and f"org/base_lora-{name}" in skipping.refused[name]
    assert sorted(hub.fetched(".safetensors")) == 4 * ["adapter_model.safetensors"] + [
        "default/adapter_model.safetensors"
    ]


def test_a_second_time_one_listing_is_asked_for_and_offline_nothing(hub: HubServer, tmp_path: Path) -> None:
    env, call = hub.env(tmp_path / "home"), {"places": "org/base_lora-*", "on_bad_adapter": "skip"}
    [first] = opened(env, tmp_path, call)
    hub.clear()
    assert opened(env, tmp_path, call) == [first]
    asked = [request.kind for request in hub.requests if "agent" not in request.path]
    assert asked.count("list") == 3 and set(asked) <= {"list", "resolve"}  # 8 repositories in pages; the gated one
    assert not hub.fetched()
    hub.clear()
    assert opened({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, call) == [first]
    [strict] = opened({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, {"places": "org/base_lora-*"})
    assert strict.error == "PoolError"
    assert not hub.requests
    [unknown] = opened({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, {"places": "org/base_lora-a*"})
    assert unknown.error == "HubError" and "offline, and no earlier list of them is in the cache" in unknown.message


def test_offline_a_place_does_not_depend_on_others_that_were_opened(hub: HubServer, tmp_path: Path) -> None:
    env, skip = hub.env(tmp_path / "home"), {"on_bad_adapter": "skip"}
    call: dict[str, Any] = {"places": "org/base_lora-*", **skip}
    first, part = opened(env, tmp_path, call, {"places": "org/base_lora-*/default", **skip})
    assert first.names == TASKS and part.names == ["nested"] and "arc" in part.refused
    commit = hub.add("org/base_lora-boolq", tmp_path / "made" / "nothing", "empty")
    [bare] = opened(env, tmp_path, {"places": f"org/base_lora-*@{commit}", **skip})
    assert bare.error == "PoolError"  # no repository has an adapter there
    calls = [call, {"places": "org/base_lora-*/default", **skip}]
    assert opened({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, *calls) == [first, part]


@pytest.mark.long
def test_a_pool_is_never_smaller_because_a_connection_broke(hub: HubServer, tmp_path: Path) -> None:
    env, call = hub.env(tmp_path / "home"), {"places": "org/base_lora-*", "on_bad_adapter": "skip"}
    hub.cut("default/adapter_model.safetensors", times=FOREVER)
    [broken] = opened(env, tmp_path, call)
    assert broken.error == "HubError" and "repositories fetched" in broken.message, broken
    [offline] = opened({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, call)
    assert offline.error == "HubError" and "OFFLINE" in offline.message.upper()
    hub.cut("default/adapter_model.safetensors", times=0)
    [whole] = opened(env, tmp_path, call)
    assert whole.names == TASKS
    hub.outage = 503
    warned = CLIENT.replace('"error", module', '"ignore", module')
    done = subprocess.run(
        [*python(), "-c", warned],
        input=json.dumps([call]),
        env=environment(env, tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert json.loads(done.stdout)["names"] == TASKS, done.stderr


def test_what_a_new_listing_says_counts(hub: HubServer, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "home")
    [before] = opened(env, tmp_path, {"places": "org/base_lora-arc*"})
    assert before.names == ["org/base_lora-arc"]  # the star stands for nothing
    write_adapter(tmp_path / "newer", 77)
    hub.add("org/base_lora-arc", tmp_path / "newer")
    hub.add("org/base_lora-arc2", tmp_path / "made" / "copa")
    [after] = opened(env, tmp_path, {"places": "org/base_lora-arc*"})
    assert after.names == ["2", "org/base_lora-arc"]
    assert after.sha256["org/base_lora-arc"] != before.sha256["org/base_lora-arc"]


def test_a_library_has_plain_and_activated_forms_for_several_bases(hub: HubServer, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "home")
    chosen = "org/library/*/granite-8b/lora"
    [some] = opened(env, tmp_path, {"places": chosen})
    assert some.names == ["answerability", "citations"] and some.acting == ["everywhere"] * 2
    assert not [file for file in hub.fetched() if "granite-2b" in file or "alora" in file]
    all_, activated, none = opened(
        env,
        tmp_path,
        {"places": "org/library"},
        {"places": "org/library/*/granite-2b/alora"},
        {"places": "org/library/*/granite-9b"},
    )
    assert all_.names == [f"{task}/granite-{size}/lora" for task in some.names for size in ("2b", "8b")]
    assert len(all_.refused) == 4
    assert "activated form of 'citations/granite-2b/lora'" in all_.refused["citations/granite-2b/alora"]
    assert activated.names == some.names and activated.acting == ["invocation"] * 2
    assert none.error == "PoolError" and "no adapters match org/library/*/granite-9b" in none.message


def test_several_places_stand_in_front_of_names(hub: HubServer, tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine" / "french", 50)
    places = [str(tmp_path / "mine"), "org/base_lora-nested", "org/library/citations/*/lora"]
    [listed, text, gone, clash] = opened(
        hub.env(tmp_path / "home"),
        tmp_path,
        {"places": places},
        {"places": ",".join(places)},
        {"places": [*places, "org/none"], "on_bad_adapter": "skip"},
        {"places": [str(tmp_path / "mine"), str(tmp_path / "mine" / ".." / "mine")]},
    )
    front = "org/library/citations/granite"
    assert listed.names == ["french", "org/base_lora-nested", f"{front}-2b/lora", f"{front}-8b/lora"]
    assert text == listed
    assert gone.error == "HubError" and "org/none" in gone.message  # named in full: no adapter to leave out
    assert clash.error == "PoolError" and "have the same name" in clash.message


def test_a_manifest_gives_the_same_bytes_or_says_what_changed(hub: HubServer, tmp_path: Path) -> None:
    env, home = hub.env(tmp_path / "home"), tmp_path
    (tmp_path / "mine").mkdir()
    write_adapter(tmp_path / "mine" / "french", 50)
    (tmp_path / "mine" / "pool.json").write_text('{"activation": "last:4"}')
    lock = ("pool", "lock", "org/base_lora-*", "mine", "-o", "pools/all.yaml", "--on-bad-adapter", "skip")
    (tmp_path / "pools").mkdir()
    done = command(env, home, *lock, at=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pools/all.yaml: 6 adapters, 5 commits, 3 left out" in done.stdout and "refused" in done.stderr
    said = yaml.safe_load((tmp_path / "pools" / "all.yaml").read_text())
    entries = {entry["name"]: entry for entry in said["adapters"]}
    assert entries["french"]["source"] == "../mine/french" and entries["french"]["activation"] == "last:4"
    nested = entries["org/base_lora-nested"]
    assert nested["source"] == "org/base_lora-nested/default"
    assert nested["revision"] == hub.repos["org/base_lora-nested"].refs["main"]
    assert {one["name"] for one in said["left_out"]} == {
        f"org/base_lora-{name}" for name in ("gated", "nothing", "pickled")
    }

    manifest = str(tmp_path / "pools" / "all.yaml")
    [live] = opened(env, home, {"places": ["org/base_lora-*", str(tmp_path / "mine")], "on_bad_adapter": "skip"})
    hub.add("org/base_lora-arc", tmp_path / "made" / "copa")  # what moved on does not matter
    shutil.rmtree(tmp_path / "home")
    [locked] = opened(env, home, {"places": manifest})
    assert (locked.names, locked.sha256, locked.acting) == (live.names, live.sha256, live.acting)
    assert not locked.refused
    hub.clear()
    assert opened({**env, "HF_HUB_OFFLINE": "1"}, home, {"places": manifest}) == [locked] and not hub.requests

    (tmp_path / "mine" / "pool.json").unlink()  # the manifest says where it acts
    assert opened(env, home, {"places": manifest}) == [locked]
    edit(tmp_path / "mine" / "french", lora_alpha=1)
    strict, skipping = opened(env, home, {"places": manifest}, {"places": manifest, "on_bad_adapter": "skip"})
    assert strict.error == "PoolError" and "adapter_config.json is not the one in the manifest" in strict.message
    assert skipping.names == locked.names[1:] and "write the manifest again" in skipping.refused["french"]

    again = command(env, home, *lock, at=tmp_path)
    assert again.returncode == 2 and "--replace" in again.stderr
    again = command(env, home, *lock, "--replace", at=tmp_path)
    assert again.returncode == 0 and "2 changes" in again.stdout, again.stderr
    assert "~ org/base_lora-arc: other weights, another configuration (" in again.stderr
    assert "~ french: another configuration" in again.stderr
    for blob in (tmp_path / "home" / "hub").glob("models--org--base_lora-boolq/blobs/*"):
        blob.write_bytes(blob.read_bytes() + b" ")
    [damaged] = opened(env, home, {"places": manifest, "on_bad_adapter": "skip"})
    assert "boolq" in str(damaged.refused) and "org/base_lora-boolq" not in damaged.names


def test_a_manifest_by_hand(hub: HubServer, tmp_path: Path) -> None:
    write_adapter(tmp_path / "french", 50)
    pool = tmp_path / "pool.yml"
    pool.write_text(
        "adapters:\n- org/base_lora-arc\n- ./french\n- {source: org/base_lora-gated}\n"
        "- {source: org/library/citations/granite-8b/lora, name: cite, tags: [rag]}\n"
    )
    env = hub.env(tmp_path / "home")
    strict, skipping, wrong = opened(
        env,
        tmp_path,
        {"places": str(pool)},
        {"places": str(pool), "on_bad_adapter": "skip"},
        {"places": [str(pool), "org/other"], "on_bad_adapter": "skip"},
    )
    assert strict.error == "PoolError" and "access is gated" in strict.message
    assert skipping.names == ["cite", "french", "org/base_lora-arc"]
    assert list(skipping.refused) == ["org/base_lora-gated"]
    assert wrong.names == [*skipping.names, "org/other"]


def test_a_download_that_was_killed_goes_on(tmp_path: Path) -> None:
    count = 60
    repos = {}
    for number in range(count):
        write_adapter(tmp_path / "made" / str(number), number + 1, columns=40_000)
        repos[f"org/many-{number:03d}"] = tmp_path / "made" / str(number)
    with HubServer(repos) as hub:
        env = environment(hub.env(tmp_path / "home"), tmp_path)
        call = json.dumps([{"places": "org/many-*"}])
        process = subprocess.Popen(
            [*python(), "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )
        assert process.stdin is not None
        process.stdin.write(call)
        process.stdin.close()
        end = time.monotonic() + PATIENCE
        while len(hub.fetched(".safetensors")) < count // 3 and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert process.stdout is not None
        process.stdout.close()
        before = len(hub.fetched(".safetensors"))
        assert count // 3 <= before < count
        [offline] = opened({**hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}, tmp_path, {"places": "org/many-*"})
        assert offline.error == "HubError"
        [answer] = opened(hub.env(tmp_path / "home"), tmp_path, {"places": "org/many-*"})
        assert answer.names == [f"{number:03d}" for number in range(count)]
        assert len(hub.fetched(".safetensors")) <= count + 8  # those that were on their way when it was killed


SEEN: list[EngineOptions] = []


def take(engine: EngineOptions) -> None:
    SEEN.append(engine)


def test_the_command_line_takes_the_option_again() -> None:
    app = typer.Typer()
    app.command()(expanded(take))
    for arguments in ([], ["--adapters", "a"], ["--adapters", "a", "--adapters", "org/b-*,c"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert [one.adapters for one in SEEN] == [None, "a", "a,org/b-*,c"]


def test_what_a_repository_has_beside_its_adapter_is_told(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_adapter(made / "one", 1)
    write_adapter(made / "one" / "checkpoint-50", 2)
    write_adapter(made / "one" / "checkpoint-50x", 3)
    write_adapter(made / "two" / "tasks" / "arc" / "lora", 4)
    with HubServer({"org/x-one": made / "one", "org/x-two": made / "two"}) as hub:
        env = hub.env(tmp_path / "home")
        all_, strict, skipping, alone = opened(
            env,
            tmp_path,
            {"places": "org/x-*"},
            {"places": "org/x-*/tasks/*/lora"},
            {"places": "org/x-*/tasks/*/lora", "on_bad_adapter": "skip"},
            {"places": ["org/x-one/checkpoint-50", "org/x-two"]},
        )
    assert all_.names == ["one", "one/checkpoint-50x", "two/tasks/arc/lora"]
    assert list(all_.refused) == ["one/checkpoint-50"]
    assert "it is a training checkpoint" in all_.refused["one/checkpoint-50"]
    assert strict.error == "PoolError" and "has no folder 'tasks'" in strict.message
    assert skipping.names == ["two/arc"] and len(skipping.refused) == 1
    assert alone.names == ["org/x-one/checkpoint-50", "org/x-two/tasks/arc/lora"]


def test_a_manifest_of_one_repository_fetches_what_it_names_in_one_go(hub: HubServer, tmp_path: Path) -> None:
    hub.page_size, pool = 1000, tmp_path / "pool.yaml"
    commit = hub.repos["org/library"].refs["main"]
    tasks = ("answerability", "citations")
    places = [f"org/library/{task}/granite-2b/{kind}" for task in tasks for kind in ("lora", "alora")]
    pool.write_text(yaml.safe_dump({"adapters": [{"source": place, "revision": commit} for place in places]}))
    env = hub.env(tmp_path / "home")
    [answer] = opened(env, tmp_path, {"places": str(pool)})
    assert answer.names == sorted(places) and not answer.refused  # both forms: each is named
    assert len(hub.fetched(".safetensors")) == 4 and sum(request.kind == "tree" for request in hub.requests) == 1
    hub.clear()
    entries = [{"source": place, "name": str(i), "revision": commit} for i, place in enumerate(places)]
    pool.write_text(yaml.safe_dump({"adapters": entries}))
    [named] = opened({**env, "HF_HUB_OFFLINE": "1"}, tmp_path, {"places": str(pool)})
    assert named.names == ["0", "1", "2", "3"] and not hub.requests
    pool.write_text(yaml.safe_dump({"adapters": [{"source": "org/library/nowhere", "name": "x"}, places[0]]}))
    strict, skipping = opened(env, tmp_path, {"places": str(pool)}, {"places": str(pool), "on_bad_adapter": "skip"})
    assert strict.error == "PoolError" and "expected one adapter in" in strict.message
    assert skipping.names == [places[0]] and list(skipping.refused) == ["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters: []", "expected `adapters:`"),
        ("[]", "expected `adapters:`"),
        ("adapters: [{name: a}]", "entry 1, 'a': source: expected a text"),
        ("adapters: [{source: org/a, shar256: x}]", "unknown key 'shar256' (did you mean 'sha256'?)"),
        ("adapters: [{source: org/a, sha256: x}]", "sha256: expected 64 hexadecimal digits"),
        ("adapters: [{source: org/a, examples_sha256: 1}]", "examples_sha256: expected 64 hexadecimal digits or none"),
        ("adapters: [{source: org/a, name: x}, {source: org/b, name: x}]", "two adapters are called 'x'"),
        ("adapters: ['org/a-*']", "expected one folder"),
        ("adapters: [{source: ./a, revision: main}]", "is a folder, which has no revision"),
        ("adapters: [org/a/../b]", "is not a folder inside it"),
        ("adapters: [{source: org/a, revision: ../b}]", "is not a branch"),
        ("version: 2\nadapters: [org/a]", "expected version 1, found 2"),
        ("adapters: [!!python/object/apply:os.system ['true']]", "is not valid YAML"),
        ("adapters: [org/a", "is not valid YAML"),
    ],
)
def test_a_manifest_that_is_none_is_refused_in_a_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        AdapterPool.open(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)
