"""`logo pool inspect` and `logo pool examples` on small pools, and adapters that `logo pool` leaves out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from logo import AdapterPool
from logo.adapters.adapter import open_adapter
from logo.adapters.examples import write_examples
from logo.cli.app import run
from make_adapters import Q, V, edit_weights, tensors, write, write_drawer, write_peft


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Three adapters, of which `dead` does nothing."""
    root = tmp_path / "pool"
    for number, name in enumerate(("a", "deep/b", "dead")):
        write(root / name, tensors(seed=number), base_model_name_or_path="org/base-1B")
    edit_weights(root / "dead", lambda w: [w[key].zero_() for key in w if "lora_B" in key])
    return root


def output(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert run(["pool", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


# ---- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_says_how_large_updates_are(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = output(capsys, "inspect", pool)["adapters"]
    assert [one["name"] for one in found] == ["a", "dead", "deep/b"]
    updates = open_adapter(pool / "a").read()
    dense = [(one.scaled_b() @ one.A).double() for path, one in updates.items() if path.endswith((Q, V))]
    assert found[0]["norm"] == pytest.approx(math.hypot(*(float(one.norm()) for one in dense)), rel=1e-5)
    ranks = []
    for one in dense:
        shares = torch.linalg.svdvals(one)[:4] ** 2
        shares /= shares.sum()
        ranks.append(math.exp(-float((shares * shares.log()).sum())))
    assert found[0]["effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
    assert (found[1]["norm"], found[1]["effective_rank"]) == (0.0, 0.0)
    assert run(["pool", "inspect", str(pool)]) == 0
    said = capsys.readouterr().out
    assert "effective rank" in said and f"{pool}: 3 usable" in said


def test_inspect_tells_what_would_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_drawer(tmp_path / "pool", ("nan", "kasa"))
    write_peft(tmp_path / "pool" / "whole", tiny.model("llama"), modules_to_save=["lm_head"])
    found = output(capsys, "inspect", tmp_path / "pool", code=1)
    assert [one["name"] for one in found["adapters"]] == ["good"]
    reasons = {one["name"]: one["reason"] for one in found["refused"]}
    assert list(reasons) == ["kasa", "nan", "whole"] and "it holds full weights" in reasons["whole"]
    assert run(["pool", "inspect", str(tmp_path / "pool")]) == 1
    (tmp_path / "empty").mkdir()
    assert run(["pool", "inspect", str(tmp_path / "empty")]) == 1
    assert "0 usable" in capsys.readouterr().out
    write_peft(tmp_path / "empty" / "plain")
    assert run(["pool", "inspect", str(tmp_path / "empty")]) == 0


def test_nobody_is_left_out_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_drawer(tmp_path / "pool", ("nan", "kasa"))
    assert run(["pool", "push", str(root), "org/x", "--dry-run", "--path-in-repo", "."]) == 1
    locking = ["pool", "lock", str(root), "--save", str(tmp_path / "pool.yaml")]
    assert run(locking) == 1
    assert "--on-bad-adapter skip" in capsys.readouterr().err
    assert run([*locking, "--on-bad-adapter", "skip", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["refused"]
    assert sorted(one["name"] for one in told) == ["kasa", "nan"] and all(one["reason"] for one in told)
    assert run(["pool", "examples", str(root)]) == 1
    assert "refused" not in capsys.readouterr().out


# ---- examples -------------------------------------------------------------------------------------------------------


def test_examples_of_requests_that_named_their_adapter(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a server logs them: those that were scored, cut, or named several adapters, are no examples."""
    write_examples(pool / "dead", ["its own"])

    def logged(name: str, prompt: str, **more: Any) -> dict[str, Any]:
        return {"adapters": [name], "weights": [1.0], "scores": {}, "prompt": prompt, **more}

    entries = [logged("a", f"prompt {n}") for n in range(9)]
    entries += [logged("a", "scored", scores={"a": 3.0}), logged("a", "long", cut=True), logged("a", "Both  of them")]
    entries += [logged("deep/b", text) for text in ("both of THEM", "one", "two")]
    entries += [logged(name, f"{name} {n}") for name in ("dead", "gone") for n in "123"]
    entries.append({"adapters": ["a", "dead"], "weights": [0.5, 0.5], "scores": {}, "prompt": "two adapters"})
    log = tmp_path / "day.log"
    lines = [json.dumps({"logger": "logo.access", "selections": [one]}) for one in entries]
    log.write_text("\n".join([*lines, "another program's line", '{"logger": "logo.access"}', ""]))
    assert output(capsys, "examples", pool, "--from-log", log) == {"a": 8, "dead": 1, "deep/b": 0}
    assert AdapterPool.open(pool)["a"].examples == tuple(f"prompt {n}" for n in range(8))
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "row {n}", "adapter": "deep/b"}}\n' for n in range(3)))
    assert run(["pool", "examples", str(pool), "--from-log", str(tmp_path / "rows.jsonl")]) == 0
    assert "   3 deep/b (new)" in capsys.readouterr().out
    assert run(["pool", "examples", str(pool), "a", "--from-log", str(log)]) == 2
    (tmp_path / "rows.jsonl").write_text('{"prompt": "no name"}\n')
    assert run(["pool", "examples", str(pool), "--from-log", str(tmp_path / "rows.jsonl")]) == 1
    assert "found no prompt that names its adapter" in capsys.readouterr().err


def test_examples_need_a_place_where_they_can_be_stored(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "examples", "org/loras"]) == 2
    assert "make a manifest first: `logo pool lock org/loras --save pool.yaml`" in capsys.readouterr().err
