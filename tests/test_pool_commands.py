"""`logo pool inspect --spectra`, `dedupe`, `diff` and `card` on small pools."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from logo import AdapterPool
from logo.adapters.format import open_adapter
from logo.adapters.upkeep.differences import difference_of
from logo.cli.run import run
from make_adapters import (
    CONFIG,
    LLAMA,
    SAFETENSORS,
    Q,
    calm,
    damage,
    edit_config,
    edit_weights,
    tensors,
    write,
    write_drawer,
)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Four adapters, of which `twin` is `a` in bfloat16, and `dead` does nothing."""
    root = tmp_path / "pool"
    for number, name in enumerate(("a", "deep/b", "dead")):
        write(root / name, tensors(seed=number), base_model_name_or_path="org/base-1B")
    edit_weights(root / "dead", lambda w: [w[key].zero_() for key in w if "lora_B" in key])
    twin = {key: value.bfloat16() for key, value in tensors(seed=0).items()}
    write(root / "twin", twin, base_model_name_or_path="org/base-1B")
    return root


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert run(["pool", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- inspect --spectra ----------------------------------------------------------------------------------------------


def test_inspect_says_what_adapters_do(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "inspect", str(pool), "--spectra"]) == 0
    said = capsys.readouterr().out
    assert "near-duplicates a, twin: overlap 1.00, cosine 1.00" in said
    assert "stands out dead: does nothing: its update is zero in every module (B = 0)" in said
    assert "median norm" in said and "effective rank" in said and f"{pool}: 4 usable" in said
    assert [line.split()[:2] for line in said.splitlines() if line.startswith(("q_proj", "v_proj"))] == [
        [kind, layer] for kind in ("q_proj", "v_proj") for layer in ("0", "1", "2")
    ]


def test_inspect_carries_all_of_it_as_json(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = output(capsys, "inspect", pool)
    found = output(capsys, "inspect", pool, "--spectra")
    assert found | quick == found and not {"spectra", "overlap", "modules"} & quick.keys()
    names = [one["name"] for one in found["adapters"]]
    assert names == ["a", "dead", "deep/b", "twin"] == list(found["spectra"])
    update = open_adapter(pool / "a").read()[f"model.layers.0.{Q}"]
    dense = update.scaled_b() @ update.A
    one = found["spectra"]["a"]["modules"][f"layers.0.{Q}"]
    assert one["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
    shares = torch.linalg.svdvals(dense.double())[:4] ** 2
    shares /= shares.sum()
    assert one["effective_rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-4)
    assert found["overlap"][0][3] == pytest.approx(1.0, abs=1e-3) and found["overlap"][0][1] is None
    assert [pair["adapters"] for pair in found["near_duplicates"]] == [["a", "twin"]]
    assert [(one["kind"], one["adapters"]) for one in found["stands_out"]] == [("untrained", ["dead"])]
    assert found["modules"][0]["module"] == "q_proj" and found["modules"][0]["layers"] == [0, 0]


def test_inspect_takes_apart_what_is_usable_and_tells_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_drawer(tmp_path, ("nan", "kasa"))
    write(tmp_path / "other")
    found = output(capsys, "inspect", tmp_path, "--spectra")
    assert list(found["spectra"]) == ["good", "other"] and len(found["refused"]) == 2
    (tmp_path / "empty").mkdir()
    nothing = output(capsys, "inspect", tmp_path / "empty", "--spectra")
    assert nothing["spectra"] == {} and nothing["overlap"] == [] and nothing["stands_out"] == []


# ---- dedupe ---------------------------------------------------------------------------------------------------------


def test_dedupe_copies_what_stays_and_lists_who_went(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {name: {"steps": 1} for name in ("a", "twin")}
    (pool / "pool.json").write_text(json.dumps({"recipe": "r 4", "adapters": records}))
    (pool / "a" / "training.json").write_text("{}")
    responses = Path("calibration", "base", "a.safetensors")
    (pool / "a" / responses).parent.mkdir(parents=True)
    (pool / "a" / responses).write_bytes(b"responses")
    (pool / "a" / "optimizer.pt").write_bytes(b"state")
    before = {path: path.read_bytes() for path in pool.rglob("*") if path.is_file()}
    assert run(["pool", "dedupe", str(pool), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "gone twin for a: overlap 1.00, cosine 1.00, norms " in said and "3 of 4 adapters stay" in said
    assert {path: path.read_bytes() for path in pool.rglob("*") if path.is_file()} == before
    kept = AdapterPool.from_directory(tmp_path / "out")
    assert kept.names == ("a", "dead", "deep/b")
    for name in kept.names:
        assert (kept[name].folder / SAFETENSORS).read_bytes() == (pool / name / SAFETENSORS).read_bytes()
        assert (kept[name].folder / CONFIG).read_bytes() == (pool / name / CONFIG).read_bytes()
    notes = json.loads((tmp_path / "out" / "pool.json").read_text())
    assert notes["changes"] == [{"command": "dedupe", "threshold": 0.9, "gone": {"twin": "a"}, "refused": []}]
    assert notes["recipe"] == "r 4" and notes["adapters"] == {"a": {"steps": 1}}
    copied = {
        path.relative_to(tmp_path / "out" / "a") for path in (tmp_path / "out" / "a").rglob("*") if path.is_file()
    }
    assert copied == {Path(CONFIG), Path(SAFETENSORS), Path("training.json"), responses}
    assert run(["pool", "dedupe", str(pool), "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_dedupe_may_only_look(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = output(capsys, "dedupe", pool, "--out", tmp_path / "out", "--dry-run", "--threshold", "1.0")
    assert found["gone"] == [] and found["kept"] == ["a", "dead", "deep/b", "twin"]
    found = output(capsys, "dedupe", pool, "--dry-run")
    assert [(one["name"], one["kept"]) for one in found["gone"]] == [("twin", "a")]
    assert found["out"] is None and not (tmp_path / "out").exists()
    assert run(["pool", "dedupe", str(pool)]) == 2
    assert "expected --out DIR2 for the new pool" in capsys.readouterr().err


# ---- diff -----------------------------------------------------------------------------------------------------------


@calm
@given(
    seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    alpha=st.floats(0.1, 9),
)
def test_differences_are_those_of_whole_matrices(
    tmp_path_factory: pytest.TempPathFactory, seeds: tuple[int, int], ranks: tuple[int, int], alpha: float
) -> None:
    root = tmp_path_factory.mktemp("diff")
    only_q = {path: shape for path, shape in LLAMA.items() if path.endswith(Q)}
    one = open_adapter(write(root / "a", tensors(LLAMA, ranks[0], seed=seeds[0]), r=ranks[0], lora_alpha=alpha))
    other = open_adapter(write(root / "b", tensors(only_q, ranks[1], seed=seeds[1]), r=ranks[1], use_rslora=True))
    sides = [{path: w.scaled_b().double() @ w.A.double() for path, w in each.read().items()} for each in (one, other)]
    zero = torch.zeros(())
    paths = list(LLAMA)
    apart = math.hypot(*(float((sides[0][path] - sides[1].get(path, zero)).norm()) for path in paths))
    sizes = [math.hypot(*(float(matrix.norm()) for matrix in side.values())) for side in sides]
    product = sum(float((sides[0][path] * sides[1][path]).sum()) for path in only_q)
    found = difference_of("x", one, other)
    assert found.kind == "other update" and (found.modules, found.only) == (3, (3, 0))
    assert found.relative == pytest.approx(apart / sizes[0], rel=1e-5)
    assert found.cosine == pytest.approx(product / (sizes[0] * sizes[1]), rel=1e-5, abs=1e-7)


@pytest.mark.filterwarnings("ignore:.*unknown settings ignored")
def test_diff_tells_bytes_factors_and_updates_apart(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    write(other / "a", tensors(seed=0), note="another configuration, the same bytes and scales")
    flipped = {key: value.flip(0 if "lora_A" in key else 1) for key, value in tensors(seed=1).items()}
    write(other / "deep" / "b", flipped)
    write(other / "twin", tensors(seed=9))
    write(other / "renamed", tensors(seed=2))
    edit_weights(other / "renamed", lambda w: [w[key].zero_() for key in w if "lora_B" in key])
    found = output(capsys, "diff", pool, other)
    kinds = {one["name"]: one["kind"] for one in found["shared"]}
    assert kinds == {"a": "same bytes", "deep/b": "same update", "twin": "other update"}
    assert found["only"] == [["dead"], ["renamed"]] and found["renamed"] == {"dead": "renamed"} and not found["same"]
    assert run(["pool", "diff", str(pool), str(other)]) == 0
    said = capsys.readouterr().out
    assert "twin" in said and "deep/b" not in said
    assert "only in A dead (the bytes of renamed in B)" in said and "only in B renamed" in said
    assert "1 same bytes, 1 same update, 1 other update, 1 only in A, 1 only in B" in said
    assert run(["pool", "diff", str(pool), str(other), "--check"]) == 1
    assert run(["pool", "diff", str(pool), str(pool), "--check", "--all"]) == 0
    assert "4 same bytes" in capsys.readouterr().out


def test_diff_of_two_adapters_whatever_they_are_called(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = output(capsys, "diff", pool / "a", pool / "twin")
    [one] = found["shared"]
    assert one["name"] == "a" and 0 < one["relative"] < 0.01 and one["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert run(["pool", "diff", str(pool / "a"), str(pool / "twin"), "--check"]) == 1
    [one] = output(capsys, "diff", pool / "dead", pool / "a")["shared"]
    assert one["relative"] is None and one["cosine"] is None and one["kind"] == "other update"
    scaled = write(pool.parent / "scaled", tensors(seed=0))
    edit_config(scaled, lora_alpha=16)  # the same file, another scale
    [one] = output(capsys, "diff", pool / "a", scaled)["shared"]
    assert one["kind"] == "other update" and one["relative"] == pytest.approx(1.0)


def test_diff_of_other_models_and_of_nothing(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "small" / "a", tensors({path: (8, 8) for path in LLAMA}))
    [one] = output(capsys, "diff", pool, tmp_path / "small")["shared"]
    assert one["kind"] == "other shapes" and one["relative"] is None
    assert run(["pool", "diff", str(pool), str(tmp_path / "nowhere")]) == 1
    assert "expected a folder, found nothing" in capsys.readouterr().err
    damage(write(tmp_path / "bad" / "a"), float("nan"))
    assert run(["pool", "diff", str(pool), str(tmp_path / "bad")]) == 1
    assert "holds NaN" in capsys.readouterr().err


# ---- card -----------------------------------------------------------------------------------------------------------


STUDY = {
    "signals": {
        "calibrated": {"top1": 0.9512, "top3": 1.0, "mrr": 0.97, "intervals": {"top1": [0.9, 1.0]}},
        "norm": {"top1": 0.25},
    },
    "pool": ["a"],
}


def test_a_card_says_what_is_in_the_pool_and_how_it_is_used(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {name: {"rows": 9, "course": {"held_out_loss": 1.25, "steps": 3}} for name in ("a", "twin")}
    notes: dict[str, Any] = {
        "recipe": "r 4, two epochs",
        "activation": "last:4",
        "adapters": records,
        "base": {"sha256": "0"},
    }
    notes["changes"] = [{"command": "prune", "energy": 0.9, "rank": None, "relative_errors": {"a": 0.1}}]
    (pool / "pool.json").write_text(json.dumps(notes))
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    (tmp_path / "study.png").write_bytes(b"\x89PNG rest")
    arguments = ["--study", str(tmp_path / "study.json"), "--repo", "org/loras/tasks", "--license", "apache-2.0"]
    assert run(["pool", "card", str(pool), *arguments]) == 0
    assert f"{pool / 'README.md'}, {pool / 'study.png'}: written" in capsys.readouterr().out
    card = ModelCard.load(pool / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"], data["license"]) == (
        "org/base-1B",
        "adapter",
        "peft",
        "apache-2.0",
    )
    assert "lora" in data["tags"]
    text = card.text
    assert "| `deep/b` | 4 | q_proj, v_proj | 1,344 |" in text and "| bytes | held out loss |" in text
    assert text.count(" | 1.250 |") == 2 and "- recipe: r 4, two epochs" in text and "- activation: last:4" in text
    assert "- changes: prune (energy 0.9)" in text and "- adapters: `{" in text
    assert 'PeftModel.from_pretrained(model, "org/loras", subfolder="tasks/a")' in text
    assert "--adapters org/loras/tasks" in text and "--max-lora-rank 8" in text
    assert "| `calibrated` | 0.95 | 1.00 | 0.97 |" in text and "| `norm` | 0.25 |  |  |" in text
    assert "](study.png)" in text and (pool / "study.png").read_bytes() == b"\x89PNG rest"
    assert AdapterPool.from_directory(pool).names == ("a", "dead", "deep/b", "twin")
    assert run(["pool", "card", str(pool)]) == 2
    assert "add --replace to overwrite it" in capsys.readouterr().err
    assert run(["pool", "card", str(pool), "--replace", "--base-model", "org/other"]) == 0
    assert ModelCard.load(pool / "README.md").data.base_model == "org/other"


@pytest.mark.parametrize(
    "notes", ["[]", "{", '{"tasks": [1, {"a": null}], "recipe": {"r": 1}, "x": null}', '{"a": "b\\nc"}']
)
@pytest.mark.filterwarnings("ignore:.*pool.json is ignored:UserWarning")
def test_a_card_is_written_whatever_pool_json_holds(pool: Path, notes: str) -> None:
    (pool / "pool.json").write_text(notes)
    assert run(["pool", "card", str(pool)]) == 0
    assert "## Adapters" in (pool / "README.md").read_text()


def test_a_card_of_a_local_base_names_no_place_of_this_machine(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "dead", "deep/b", "twin"):
        edit_config(pool / name, base_model_name_or_path="/home/me/models/base")
    assert run(["pool", "card", str(pool), "--repo", "org/loras"]) == 0
    assert "name one with --base-model" in capsys.readouterr().err
    card = ModelCard.load(pool / "README.md")
    assert "base_model" not in card.data.to_dict() and "/home/me" not in card.text
    assert "--base-model base --adapters org/loras" in card.text


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "expected the JSON that `logo eval study` writes"), ("{", "expected the JSON"), (None, "cannot be read")],
)
def test_a_study_that_is_none(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    assert run(["pool", "card", str(pool), "--study", str(tmp_path / "study.json")]) == 1
    assert said in capsys.readouterr().err and not (pool / "README.md").exists()


def test_a_card_tells_of_what_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoints, but for one that is named itself; a folder that is called `..` has a name."""
    root = tmp_path / "tasks"
    for name in ("a", "a/checkpoint-10"):
        write(root / name, base_model_name_or_path="org/base")
    (root / "below").mkdir()
    monkeypatch.chdir(root / "below")
    told = output(capsys, "card", "..")
    assert told["adapters"] == ["a"] and told["left_out"] == ["a/checkpoint-10"]
    assert (root / "README.md").read_text().count("checkpoint") == 0 and "# tasks" in (root / "README.md").read_text()
    sent = output(capsys, "push", "..", "org/x", "--dry-run")["files"]
    assert {file["path"].split("/")[0] for file in sent} == {"base-loras-tasks"}
    named = root / "a" / "checkpoint-10"
    assert output(capsys, "card", named)["adapters"] == ["checkpoint-10"]
    sent = output(capsys, "push", named, "org/x", "--dry-run")["files"]
    assert [file["path"] for file in sent] == [
        f"base-loras-checkpoint-10/{file}" for file in ("README.md", CONFIG, SAFETENSORS)
    ]


@pytest.mark.parametrize("base", ["hf_models/Qwen2.5-7B", "./hf_models/Qwen2.5-7B/", "mine/Qwen2.5-7B"])
def test_a_folder_that_looks_like_a_place_on_the_hub_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    (tmp_path / "mine" / "Qwen2.5-7B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pool" / "a", base_model_name_or_path=base)
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({"base_model": base}))
    assert run(["pool", "card", "pool"]) == 0
    card = ModelCard.load(tmp_path / "pool" / "README.md")
    assert "base_model" not in card.data.to_dict() and "`Qwen2.5-7B`, in PEFT" in card.text
    write(tmp_path / "pool" / "b", base_model_name_or_path="Qwen/Qwen2.5-7B")  # the same, by its name
    assert run(["pool", "card", "pool", "--replace"]) == 0
    assert ModelCard.load(tmp_path / "pool" / "README.md").data.base_model == "Qwen/Qwen2.5-7B"
    assert run(["pool", "card", "pool", "--replace", "--base-model", base]) == 0
    named = ModelCard.load(tmp_path / "pool" / "README.md").data.to_dict().get("base_model")
    assert named == ("mine/Qwen2.5-7B" if base.startswith("mine") else None)


def test_several_base_models_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, base in (("one", "org/a"), ("two", "org/b"), ("three", "org/b")):
        write(tmp_path / "pool" / name, base_model_name_or_path=base)
    (tmp_path / "pool" / "pool.json").write_text('{"base_model": "org/b"}')
    assert run(["pool", "card", str(tmp_path / "pool")]) == 0
    assert "(several: org/a, org/b): name one with --base-model" in capsys.readouterr().err
    card = ModelCard.load(tmp_path / "pool" / "README.md")
    assert "base_model" not in card.data.to_dict() and "for `org/a`, `org/b`, in PEFT" in card.text
    assert "| `one` | `org/a` | 4 |" in card.text and "| `two` | `org/b` | 4 |" in card.text


@pytest.mark.parametrize(
    ("repo", "peft", "vllm"),
    [
        (None, '"{pool}"', "{pool}"),
        ("org/x", '"org/x"', "pool"),
        ("org/x/f", '"org/x", subfolder="f"', "pool/f"),
    ],
)
def test_paths_of_a_pool_that_is_one_adapter(tmp_path: Path, repo: str | None, peft: str, vllm: str) -> None:
    """As `push` puts it there: its files lie where the pool's would."""
    pool = write(tmp_path / "alone", base_model_name_or_path="org/base")
    assert run(["pool", "card", str(pool), *(["--repo", repo] if repo else [])]) == 0
    text = (pool / "README.md").read_text()
    assert f"PeftModel.from_pretrained(model, {peft.format(pool=pool)})" in text
    assert json.dumps({"name": "alone", "path": vllm.format(pool=pool)}) in text


# ---- adapters that are left out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "further"),
    [
        ("prune", ["--rank", "1"]),
        ("dedupe", []),
        ("convert", []),
        ("card", []),
        ("push", ["org/x", "--dry-run", "--path-in-repo", "."]),
        ("diff", []),
    ],
)
def test_nobody_is_left_out_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, further: list[str]
) -> None:
    write_drawer(tmp_path / "pool", ("nan", "kasa"))
    writes = command in ("prune", "dedupe", "convert")
    further = further + (["--out", str(tmp_path / "out")] if writes else []) + ["--on-bad-adapter", "skip", "--json"]
    others = [str(tmp_path / "pool")] if command == "diff" else []
    assert run(["pool", command, str(tmp_path / "pool"), *others, *further]) == 0
    said = capsys.readouterr()
    assert "refused kasa: KaSA (kasa_config)" in said.err and "refused nan: tensor" in said.err
    told = json.loads(said.out)["refused"]
    for refused in told if command == "diff" else [told]:
        assert sorted(one["name"] for one in refused) == ["kasa", "nan"] and all(one["reason"] for one in refused)
    if writes:
        [change] = json.loads((tmp_path / "out" / "pool.json").read_text())["changes"]
        assert sorted(change["refused"]) == ["kasa", "nan"]
