"""`logo pool learn` with prompts whose requests named an adapter, on the pool of the demo without its own examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from openai import OpenAI

from demo_traffic import PROMPTS, STRANGE, TRAFFIC, bare_pool, written
from local_server import LocalServer
from logo import LoGo, UsageError
from logo.adapters.examples import examples_of, is_learned, named_examples, write_examples
from logo.adapters.files import EXAMPLES
from logo.cli.run import run
from logo.learning import LEAST, MOST, learn_examples
from logo.selection import Selection
from logo.serving.logged import entry, prompts_of
from tolerances import PATIENCE
from warm import logo

Said = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bare_pool(tmp_path / "pool")


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """A file of prompts, to be written."""
    return tmp_path / "day.jsonl"


def learn(file: Path, folder: Path, *options: str) -> None:
    assert run(["pool", "learn", str(file), "--adapters", str(folder), *options]) == 0


def rows(named: Mapping[str, Sequence[str]]) -> list[Any]:
    return [{"prompt": prompt, "adapter": name} for name, prompts in named.items() for prompt in prompts]


def plain(prompts: Sequence[str]) -> list[Any]:
    return [{"prompt": prompt} for prompt in prompts]


def test_prompts_that_name_an_adapter_are_its_examples(folder: Path, day: Path, capsys: Said) -> None:
    """Whatever they select, and whatever else is sure."""
    forced = [entry(Selection.forced({"capital": 1.0}), prompt) for prompt in STRANGE]
    lines = [{"logger": "logo.access", "selections": [one]} for one in forced]
    learn(written(day, [*lines, *plain([prompt for prompt in PROMPTS if prompt not in STRANGE])]), folder)
    shown = " ".join(capsys.readouterr().out.split())
    assert set(examples_of(folder / "capital")) == set(STRANGE) and is_learned(folder / "capital")
    assert len(examples_of(folder / "french")) >= LEAST
    assert f"; read {len(PROMPTS) - 3} prompts and 3 prompts that named adapters" in shown
    assert "capital 3 named Book a table" in shown
    write_examples(folder / "french", ["Mine?"])
    assert run(["pool", "examples", str(folder)]) == 0
    assert {"   3 capital (learned)", "   1 french"} <= set(capsys.readouterr().out.splitlines())


def test_names_outlast_days_without_names(folder: Path, day: Path) -> None:
    learn(written(day, rows({"capital": STRANGE})), folder)
    learn(written(day, plain(PROMPTS)), folder)
    assert set(examples_of(folder / "capital")) == set(STRANGE) == set(named_examples(folder / "capital"))
    file = folder / "capital" / EXAMPLES
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))  # a user has removed two
    kept = examples_of(folder / "capital")
    learn(written(day, plain(PROMPTS)), folder)
    assert examples_of(folder / "capital") == kept and len(kept) == 1


def test_the_same_names_give_the_same_examples(folder: Path, day: Path) -> None:
    prompts = [f"{prompt} ({i})" for prompt in TRAFFIC["capital"] for i in range(4)]
    found = []
    for seed in range(3):
        Random(seed).shuffle(prompts)
        learn(written(day, rows({"capital": prompts})), folder)
        found.append(examples_of(folder / "capital"))
    assert found[0] == found[1] == found[2] and len(found[0]) == MOST


def test_a_name_tells_other_adapters_that_a_prompt_is_not_theirs(folder: Path, day: Path) -> None:
    learn(written(day, plain(TRAFFIC["capital"])), folder)
    wrong = examples_of(folder / "capital")
    assert len(wrong) >= LEAST
    learn(written(day, [*rows({"french": wrong}), *plain(PROMPTS)]), folder)
    assert set(examples_of(folder / "french")) == set(wrong)
    assert not set(wrong) & set(examples_of(folder / "capital"))


def test_a_prompt_that_names_another_adapter_later_is_read_without_names(folder: Path, day: Path) -> None:
    learn(written(day, rows({"french": STRANGE})), folder)
    learn(written(day, rows({"capital": [STRANGE[0].upper(), *STRANGE[1:]]})), folder)
    assert not named_examples(folder / "french") and not named_examples(folder / "capital")


def test_names_can_be_ignored_also_those_of_earlier_runs(folder: Path, day: Path, capsys: Said) -> None:
    learn(written(day, rows({"french": STRANGE})), folder)
    found = []
    for lines, options in ((rows({"french": PROMPTS}), ["--ignore-names"]), (plain(PROMPTS), ["--ignore-names"])):
        capsys.readouterr()
        learn(written(day, lines), folder, "--dry-run", "--json", *options)
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["named"] == 0 and found[0]["read"] == len(PROMPTS)
    assert not any(one["named"] for examples in found[0]["examples"].values() for one in examples)


def test_which_names_count(folder: Path) -> None:
    """Three prompts at least, that name no other adapter, and an adapter without examples of its own."""
    write_examples(folder / "french", ["Mine?"])
    asked = {
        "capital": TRAFFIC["capital"][:3],
        "antonym": TRAFFIC["antonym"][:2],  # too few
        "plural": [*TRAFFIC["plural"][:2], STRANGE[0]],  # one of them names another adapter, too
        "is_past": [STRANGE[0].upper(), *STRANGE[1:], "\n"],
        "french": TRAFFIC["french"],  # has its own
        "gone": TRAFFIC["add_numbers"][:4],  # is not in the pool
    }
    found = learn_examples(LoGo.from_pretrained("demo", folder), TRAFFIC["french"], asked)
    assert [name for name, examples in found.examples.items() if any(one.named for one in examples)] == ["capital"]
    assert {one.prompt for one in found.examples["capital"]} == set(TRAFFIC["capital"][:3]) and found.named == 3
    assert "french" not in found.examples and found.unknown == {"gone": 4}
    assert found.read == 2 + 3 + 2 + 4  # antonym, plural, two of is_past, gone; french's own are known


def test_a_pool_in_which_all_are_named_reads_nothing(folder: Path) -> None:
    found = learn_examples(LoGo.from_pretrained("demo", folder), STRANGE, TRAFFIC, tell=lambda *count: pytest.fail())
    assert found.read == 0 and all(len(examples) == MOST for examples in found.examples.values())
    assert found.named == sum(map(len, TRAFFIC.values()))


def test_what_is_left_out_is_said(folder: Path, day: Path, capsys: Said) -> None:
    long = [f"{'word ' * 3000}{i}" for i in range(2)]
    lines = rows({"french": [*STRANGE, *long], "reverse-word": TRAFFIC["reverse_word"][:3]})
    learn(written(day, lines), folder, "--dry-run")
    shown = " ".join(capsys.readouterr().out.split())
    assert "left out 2 prompts longer than the base model's context" in shown
    assert "no adapter of the pool has the name 'reverse-word' (3 prompts)" in shown


def test_a_dry_run_says_what_would_be_removed(folder: Path, day: Path, capsys: Said) -> None:
    learn(written(day, rows({"french": STRANGE})), folder)
    learn(written(day, plain(STRANGE)), folder, "--ignore-names", "--dry-run", "--confidence", "0.999999")
    assert "would be removed earlier examples of french" in " ".join(capsys.readouterr().out.split())
    assert set(examples_of(folder / "french")) == set(STRANGE)


def test_labels_of_pools_whose_examples_do_not_count_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logo = LoGo.from_pretrained("demo", folder)
    monkeypatch.setattr("logo.selection.scorers.Scorers._signatures", lambda *given: None)
    with pytest.raises(UsageError, match="do not count"):
        learn_examples(logo, [], {"french": STRANGE})


@pytest.mark.parametrize(
    "fields",
    [
        {"adapters": ["a", "b"], "weights": [0.5, 0.5]},
        {"adapters": []},
        {"adapters": [3]},
        {"adapters": "a"},
        {"scores": {"a": 1}},
        {"weights": [0.3]},
        {"weights": [-1]},
        {"weights": None},
    ],
)
def test_what_names_no_single_adapter(fields: dict[str, Any]) -> None:
    one = {"adapters": ["a"], "weights": [1.0], "scores": {}, "prompt": "x"}
    assert prompts_of({"logger": "logo.access", "selections": [one]}) == [("x", "a")]
    assert prompts_of({"logger": "logo.access", "selections": [{**one, **fields}]}) == [("x", None)]


@pytest.mark.parametrize("adapter", [3, "", None, ["a"]])
def test_what_is_no_name(adapter: Any) -> None:
    assert prompts_of({"prompt": "x", "adapter": adapter}) == [("x", None)]


@pytest.mark.slow
def test_a_servers_log_has_the_names(folder: Path, tmp_path: Path) -> None:
    """As the model of a request, or alone in its field `logo`; a mixture names none."""
    log, asked = tmp_path / "day.log", TRAFFIC["capital"][:6]
    options = ["--base-model", "demo", "--adapters", str(folder), "--log-json", "--log-prompts"]
    with LocalServer(options, start=PATIENCE, log=log, program=logo()) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="-")
        fields: list[dict[str, Any]] = [{"adapters": {"capital": 1.0}}] * 2
        fields += [{"adapters": {"capital": 0.5, "french": 0.5}}, {"adapters": {"capital": 0.5}}]
        for prompt in asked[:2]:
            client.completions.create(model="capital", prompt=prompt, max_tokens=1)
        for prompt, one in zip(asked[2:], fields, strict=True):
            client.completions.create(model="logo", prompt=prompt, max_tokens=1, extra_body={"logo": one})
    learn(log, folder)
    assert set(named_examples(folder / "capital")) == set(asked[:4])
