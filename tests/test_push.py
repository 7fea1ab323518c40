"""`logo pool push`: the real huggingface_hub client sends a pool to a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hub_server import GOOD_TOKEN, STRANGER_TOKEN, HubServer
from logo import AdapterPool
from logo.cli.app import run
from logo.cli.pool.publish import contents_of
from logo.errors import UsageError
from make_adapters import CONFIG, SAFETENSORS, tensors, write
from warm import logo, python

pytestmark = pytest.mark.slow


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Two adapters, beside what lies in such folders."""
    root = tmp_path / "tasks"
    for number, name in enumerate(("a[1]", "deep/b.v2")):
        write(root / name, tensors(seed=number), base_model_name_or_path="org/base-1B")
    write(root / "deep" / "b.v2" / "checkpoint-10", tensors(seed=9))
    (root / "deep" / "b.v2" / "optimizer.bin").write_bytes(b"state")
    (root / "deep" / "b.v2" / "README.md").write_text("of the adapter")
    (root / "pool.json").write_text('{"recipe": "r 4"}')
    (root / "secret.txt").write_text("mine")
    (root / "deep" / "b.v2" / "logo.yaml").write_text("{}")
    return root


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({}) as server:
        yield server


def push(hub: HubServer, pool: Path, *more: str, token: str | None = GOOD_TOKEN) -> subprocess.CompletedProcess[str]:
    extra = {} if token is None else {"HF_TOKEN": token}
    return hub.run([*logo(), "pool", "push", str(pool), *more], pool.parent / "hf", **extra)


FILES = [f"{name}/{file}" for name in ("a[1]", "deep/b.v2") for file in (CONFIG, SAFETENSORS)]
FILES += ["pool.json", "deep/b.v2/logo.yaml", "README.md"]


def test_what_is_sent(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "push", str(pool), "org/loras", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sorted(file["path"] for file in said["files"]) == sorted(f"base-1B-loras-tasks/{file}" for file in FILES)
    assert [one["name"] for one in said["refused"]] == ["deep/b.v2/checkpoint-10"] and said["url"] is None
    assert run(["pool", "push", str(pool), "org/loras", "--dry-run", "--path-in-repo", "."]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].startswith(f"a[1]/{CONFIG}  ") and "nothing sent" in captured.out
    assert "left out deep/b.v2/checkpoint-10: it is a training checkpoint" in captured.err


def contents(root: Path, folder: str | None = "f") -> Any:
    return contents_of(root, list(AdapterPool.open(root)), "org/x", folder)


def test_a_pool_of_unknown_or_several_bases_says_where_to(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(UsageError, match="name no base model; give the folder to write with --path-in-repo"):
        contents(tmp_path, None)
    for name in ("b", "c"):
        write(tmp_path / name, base_model_name_or_path=f"org/{name}")
    with pytest.raises(UsageError, match=r"several base models \(b, c\)"):
        contents(tmp_path, None)
    assert "here/README.md" in contents(tmp_path, "here/")


def test_a_pool_goes_to_the_hub_and_comes_back(hub: HubServer, pool: Path, tmp_path: Path) -> None:
    done = push(hub, pool, "org/loras")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/loras/tree/main/base-1B-loras-tasks: 2 adapters, 7 files" in done.stdout
    held = hub.files("org/loras")
    expected = {f"base-1B-loras-tasks/{file}": (pool / file).read_bytes() for file in FILES if file != "README.md"}
    top = held.pop("README.md").decode()
    assert held.pop("base-1B-loras-tasks/README.md").decode() == top
    assert held == expected and not hub.repos["org/loras"].private
    card = ModelCard(top)
    assert card.data.base_model == "org/base-1B"
    assert "LoRA adapters for `org/base-1B`, in PEFT" in card.text
    assert "| `deep/b.v2` | 4 | q_proj, v_proj | 1,344 |" in card.text
    assert "--adapters org/loras/base-1B-loras-tasks" in card.text
    assert 'PeftModel.from_pretrained(model, "org/loras", subfolder="base-1B-loras-tasks/a[1]")' in card.text
    assert [message for message, _ in hub.received] == ["7 files of the pool tasks"]
    code = (
        "from logo import AdapterPool; pool = AdapterPool.open('org/loras/base-1B-loras-tasks'); "
        "print(*pool.names); print(*pool.sha256().values())"
    )
    back = hub.run([*python(), "-c", code], tmp_path / "hf2")
    assert back.returncode == 0, back.stderr
    sent = AdapterPool.open(pool).subset(["a[1]", "deep/b.v2"])
    assert back.stdout.split() == [*sent.names, *sent.sha256().values()]
    write(pool / "c", tensors(seed=5), base_model_name_or_path="org/base-1B")
    assert push(hub, pool, "org/loras").returncode == 0
    new = {f"base-1B-loras-tasks/{file}" for file in ("README.md", f"c/{CONFIG}", f"c/{SAFETENSORS}")}
    assert set(hub.received[-1][1]) == new  # what was there is not sent again
    assert hub.files("org/loras")["README.md"].decode() == top


def test_what_the_pool_no_longer_says_of_its_adapters_leaves_the_hub(hub: HubServer, pool: Path) -> None:
    """And a card that somebody has written stays, and so does what is said of adapters that are there alone."""
    for name in ("a[1]", "alone"):
        write(pool / name, base_model_name_or_path="org/base-1B")
        (pool / name / "pool.json").write_text('{"activation": "last:3"}')
    (pool / "README.md").write_text("# Mine")
    assert push(hub, pool, "org/loras").returncode == 0
    shutil.rmtree(pool / "alone")
    for file in [*pool.rglob("pool.json"), pool / "README.md"]:
        file.unlink()
    assert "deleted base-1B-loras-tasks/a[1]/pool.json\n" in push(hub, pool, "org/loras").stdout
    held = hub.files("org/loras")
    assert [name for name in held if name.endswith("pool.json")] == ["base-1B-loras-tasks/alone/pool.json"]
    assert held["base-1B-loras-tasks/README.md"] == b"# Mine"


def test_private_means_private(hub: HubServer, pool: Path, tmp_path: Path) -> None:
    done = push(hub, pool, "org/hidden", "--private", "--path-in-repo", ".")
    assert done.returncode == 0, done.stderr
    assert hub.repos["org/hidden"].private and sorted(hub.files("org/hidden")) == sorted(FILES)
    assert [message for message, _ in hub.received] == ["7 files of the pool tasks"]
    assert push(hub, pool, "org/hidden", "--private", "--path-in-repo", "more").returncode == 0
    hub.add("org/open", tmp_path / "nothing")
    done = push(hub, pool, "org/open", "--private")
    assert done.returncode == 1 and "it exists and is public" in done.stderr and hub.files("org/open") == {}


def test_a_refusal_is_one_line(hub: HubServer, pool: Path) -> None:
    for token, outage, said in (
        (None, None, "does not accept this token, or there is none: set HF_TOKEN"),
        (STRANGER_TOKEN, None, "this token may not do that"),
        (GOOD_TOKEN, 500, "answered with HTTP status 500"),
    ):
        hub.outage = outage
        done = push(hub, pool, "org/loras", token=token)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and error.startswith("logo: error: Hub repo org/loras: ") and said in error
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("note", ["pool.json", "a[1]/logo.yaml", "README.md"])
def test_no_link_carries_a_file_out(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], note: str) -> None:
    (tmp_path / "secret.txt").write_text('{"key": "mine"}')
    (pool / note).unlink(missing_ok=True)
    (pool / note).symlink_to(tmp_path / "secret.txt")
    assert run(["pool", "push", str(pool), "org/x", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert f"{note} is a link out of the pool" in said.err and "secret.txt" not in said.out


def test_links_within_the_pool_and_the_cache_of_the_hub_are_its_own(pool: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--x"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    root = pool.rename(cache / "snapshots" / "0123")
    (root / "pool.json").rename(cache / "blobs" / "45")
    (root / "pool.json").symlink_to("../../blobs/45")
    (root / "a[1]" / "logo.yaml").symlink_to("../deep/b.v2/logo.yaml")
    write(tmp_path / "elsewhere", tensors(seed=1), base_model_name_or_path="org/base")
    (root / "linked").symlink_to(tmp_path / "elsewhere")  # an adapter, which is sent too
    linked = {f"f/linked/{name}" for name in (CONFIG, SAFETENSORS)}
    assert linked | {"f/pool.json", "f/a[1]/logo.yaml"} <= set(contents(root))


@pytest.mark.parametrize("base", ["hf_models/Qwen2.5-7B", "./hf_models/Qwen2.5-7B/", "mine/Qwen2.5-7B"])
def test_a_folder_that_looks_like_a_repo_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    (tmp_path / "mine" / "Qwen2.5-7B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write(Path("pool/a"), base_model_name_or_path=base)

    def card() -> ModelCard:
        return ModelCard(contents(Path("pool"))["f/README.md"].decode())

    assert "base_model" not in card().data.to_dict() and "`Qwen2.5-7B`, in PEFT" in card().text
    write(Path("pool/a"), base_model_name_or_path="Qwen/Qwen2.5-7B")
    assert card().data.base_model == "Qwen/Qwen2.5-7B"
    write(Path("pool/c"), base_model_name_or_path="org/other")
    assert "base_model" not in card().data.to_dict() and "for `Qwen/Qwen2.5-7B`, `org/other`, in PEFT" in card().text


def test_a_checkpoint_that_is_named_itself_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a folder that is called `..` has a name."""
    for name in ("a", "a/checkpoint-10"):
        write(tmp_path / "tasks" / name, base_model_name_or_path="org/base")
    (tmp_path / "tasks" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "tasks" / "below")
    for place, folder in (("..", "base-loras-tasks"), ("../a/checkpoint-10", "base-loras-checkpoint-10")):
        assert run(["pool", "push", place, "org/x", "--dry-run", "--json"]) == 0
        sent = [one["path"] for one in json.loads(capsys.readouterr().out)["files"]]
        below = "a/" if place == ".." else ""
        assert sent == [f"{folder}/README.md", *(f"{folder}/{below}{file}" for file in (CONFIG, SAFETENSORS))]
