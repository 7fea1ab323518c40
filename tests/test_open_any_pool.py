"""Pools by name, opened from a real Hub server by processes of their own: many repositories, manifests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from hub_server import FOREVER, GOOD_TOKEN, HubServer
from logo.cli.app import app
from logo.cli.options import EngineOptions
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


def environment(env: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "http"))}
    return inherited | {"PYTHONPATH": str(SOURCE), "COLUMNS": "200"} | env


def opened(env: dict[str, str], *calls: dict[str, Any]) -> list[Answer]:
    done = subprocess.run(
        [*python(), "-c", CLIENT],
        input=json.dumps(calls),
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert GOOD_TOKEN not in done.stdout + done.stderr
    answers = [Answer(**json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls) and all("\n" not in answer.message for answer in answers)
    return answers


def lock(env: dict[str, str], at: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python(), "-m", "logo.cli", "pool", "lock", *arguments],
        env=environment(env),
        cwd=at,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """An owner with a repository for each adapter, and a library with many in one."""
    made = tmp_path / "made"
    for value, task in enumerate(("arc", "boolq", "sum.v2"), 1):
        write_adapter(made / task, value)
    write_adapter(made / "nested" / "default", 5)
    write_adapter(made / "pickled", 6, weights="pickle")
    (made / "nothing").mkdir()
    (made / "nothing" / "README.md").write_text("no adapter")
    for value, task in enumerate(("answerability", "citations"), 10):
        for less, kind in enumerate(("lora", "alora")):
            folder = made / "library" / task / kind
            write_adapter(folder, 10 * value + less)
            if kind == "alora":
                config = json.loads((folder / "adapter_config.json").read_text())
                (folder / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [3, 4]}))
    repos = {f"org/base_lora-{name}": made / name for name in ("arc", "boolq", "sum.v2", "nested", "pickled")}
    repos |= {"org/other": made / "arc", "another/base_lora-arc": made / "arc", "org/library": made / "library"}
    repos |= {"org/base_lora-gated": made / "arc", "org/base_lora-nothing": made / "nothing"}
    with HubServer(repos, gated=["org/base_lora-gated"], page_size=3) as server:
        yield server


def test_a_manifest_of_all_repositories_that_are_called_so(hub: HubServer, tmp_path: Path) -> None:
    """It gives the same bytes later, without asking the Hub, or says what changed."""
    env = hub.env(tmp_path / "home")
    write_adapter(tmp_path / "mine" / "french", 50)
    (tmp_path / "pools").mkdir()
    line = ("org/base_lora-*", "mine", "--save", "pools/all.yaml")
    strict = lock(env, tmp_path, *line)
    assert strict.returncode == 1 and "access is gated" in strict.stderr
    done = lock(env, tmp_path, *line, "--on-bad-adapter", "skip")
    assert done.returncode == 0, done.stderr
    assert "pools/all.yaml: 5 adapters, 4 commits" in done.stdout
    for name, reason in {
        "gated": "access is gated",
        "nothing": "no adapters in org/base_lora-nothing@",
        "pickled": "adapter_model.safetensors is missing",
    }.items():
        assert f"refused org/base_lora-{name}" in done.stderr and reason in done.stderr
    entries = {one["name"]: one for one in yaml.safe_load((tmp_path / "pools" / "all.yaml").read_text())["adapters"]}
    assert entries["french"]["source"] == "../mine/french" and "revision" not in entries["french"]
    nested = entries["org/base_lora-nested/default"]
    assert nested["source"] == "org/base_lora-nested/default"
    assert nested["revision"] == hub.repos["org/base_lora-nested"].refs["main"]

    manifest = str(tmp_path / "pools" / "all.yaml")
    [live] = opened(env, {"places": manifest})
    assert live.names == sorted(entries) and not live.refused
    hub.add("org/base_lora-arc", tmp_path / "made" / "boolq")  # what moved on does not matter
    shutil.rmtree(tmp_path / "home")
    [again] = opened(env, {"places": manifest})
    assert again == live
    hub.clear()
    assert opened({**env, "HF_HUB_OFFLINE": "1"}, {"places": manifest}) == [live] and not hub.requests
    for blob in (tmp_path / "home" / "hub").glob("models--org--base_lora-boolq/blobs/*"):
        blob.write_bytes(blob.read_bytes() + b" ")
    [damaged] = opened(env, {"places": manifest, "on_bad_adapter": "skip"})
    assert list(damaged.refused) == ["org/base_lora-boolq"] and "org/base_lora-boolq" not in damaged.names
    nobody = lock(env, tmp_path, "org/zzz-*", "--save", "none.yaml")
    assert nobody.returncode == 1 and "no repository matches" in nobody.stderr


def test_a_pool_is_never_smaller_because_a_connection_broke(hub: HubServer, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "home")
    places = ["org/base_lora-arc", "org/base_lora-nested", "org/base_lora-gated"]
    [whole] = opened(env, {"places": places, "on_bad_adapter": "skip"})
    assert whole.names == places[:1] + ["org/base_lora-nested/default"]
    assert list(whole.refused) == ["org/base_lora-gated"]  # for a reason of its own
    shutil.rmtree(tmp_path / "home")
    hub.cut("default/adapter_model.safetensors", times=FOREVER)
    [broken] = opened(env, {"places": places, "on_bad_adapter": "skip"})
    assert broken.error == "HubError" and "the connection to" in broken.message, broken


def test_a_library_has_plain_and_activated_forms(hub: HubServer, tmp_path: Path) -> None:
    everything, activated, none = opened(
        hub.env(tmp_path / "home"),
        {"places": "org/library"},
        {"places": "org/library/citations/alora"},
        {"places": "org/library/gone"},
    )
    assert everything.names == ["answerability/lora", "citations/lora"]
    assert "activated form of 'citations/lora'" in everything.refused["citations/alora"]
    assert activated.names == ["alora"] and activated.acting == ["invocation"]
    assert none.error == "StorageError" and "no adapters in org/library/gone: No such file" in none.message


def test_several_places_stand_in_front_of_names(hub: HubServer, tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine" / "french", 50)
    places = [str(tmp_path / "mine"), "org/base_lora-arc", "org/library/citations"]
    [listed, text, gone, clash] = opened(
        hub.env(tmp_path / "home"),
        {"places": places},
        {"places": ",".join(places)},
        {"places": [*places, "org/none"]},
        {"places": [str(tmp_path / "mine"), str(tmp_path / "mine" / ".." / "mine")]},
    )
    assert listed.names == ["french", "org/base_lora-arc", "org/library/citations/lora"]
    assert text == listed
    assert gone.error == "HubError" and "org/none" in gone.message
    assert clash.error == "PoolError" and "has the same name" in clash.message


def test_a_manifest_by_hand(hub: HubServer, tmp_path: Path) -> None:
    """What one repository holds is fetched in one go, and both forms, since each is named."""
    write_adapter(tmp_path / "french", 50)
    pool = tmp_path / "pool.yml"
    pool.write_text(
        "adapters:\n- org/base_lora-arc\n- ./french\n- {source: org/base_lora-gated}\n- org/library/citations/alora\n"
        "- {source: org/library/citations/lora, name: cite}\n- {source: org/library/nowhere, name: x}\n"
    )
    env = hub.env(tmp_path / "home")
    strict, skipping = opened(env, {"places": str(pool)}, {"places": str(pool), "on_bad_adapter": "skip"})
    assert strict.error == "HubError" and "access is gated" in strict.message
    assert skipping.names == ["cite", "french", "org/base_lora-arc", "org/library/citations/alora"]
    assert sorted(skipping.refused) == ["org/base_lora-gated", "x"] and "no adapters" in skipping.refused["x"]
    assert len([file for file in hub.fetched(".safetensors") if "citations" in file]) == 2


def test_the_command_line_takes_the_option_again() -> None:
    for arguments, expected in (
        ([], None),
        (["--adapters", "a"], "a"),
        (["--adapters", "a", "--adapters", "org/b,c"], "a,org/b,c"),
    ):
        _, bound, _ = app.parse_args(["select", "x", *arguments], exit_on_error=False, print_error=False)
        assert bound.arguments.get("engine", EngineOptions()).sources == expected
