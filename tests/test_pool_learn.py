"""`logo pool learn`: examples learned from prompts without labels, on the pool of the demo without its own examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from demo_traffic import LATER, PROMPTS, STRANGE, TRAFFIC, bare_pool, written
from logo import LoGo
from logo.adapters.examples import examples_of, is_learned, write_examples
from logo.adapters.files import EXAMPLES
from logo.cli.pool import learn as command
from logo.cli.run import run
from logo.learning import LEAST, MOST, READ, SURE, Example, Learned, _different, _sample, _surest, learn_examples
from logo.selection import Selection
from logo.serving.logged import TOKENS, entry, prompts_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bare_pool(tmp_path / "pool")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def learned(folder: Path) -> Iterator[tuple[str, str]]:
    for adapter in sorted(folder.iterdir()):
        yield from ((adapter.name, prompt) for prompt in examples_of(adapter) if adapter.is_dir())


def right(logo: LoGo) -> tuple[float, float]:
    """The share of later prompts whose own adapter comes first, and the mean confidence of all."""
    asked = [(task, prompt) for task, prompts in LATER.items() for prompt in prompts]
    found = logo.select([prompt for _, prompt in asked])
    first = [one.adapters[0] == task for one, (task, _) in zip(found, asked, strict=True)]
    return sum(first) / len(asked), sum(one.confidence or 0.0 for one in found) / len(asked)


def test_sure_prompts_become_examples_and_selections_surer(folder: Path, prompts: Path) -> None:
    before = right(LoGo.from_pretrained("demo", folder))
    assert run(["pool", "learn", str(prompts), "--adapters", str(folder)]) == 0
    found = list(learned(folder))
    own = [prompt in TRAFFIC[name] for name, prompt in found]
    assert len(found) >= 90 and sum(own) >= 0.9 * len(own)
    assert not any(prompt in STRANGE for _, prompt in found)
    first, sure = right(LoGo.from_pretrained("demo", folder))
    assert first >= before[0] - 0.02 and sure > before[1] + 0.02


def test_own_examples_stay(folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_examples(folder / "capital", ["Mine?"])
    assert run(["pool", "learn", str(prompts), "--adapters", str(folder)]) == 0
    assert examples_of(folder / "capital") == ("Mine?",) and not is_learned(folder / "capital")
    assert is_learned(folder / "french")
    assert "unchanged 1 of 16 adapters, which have examples of their own" in capsys.readouterr().out


def test_a_second_day_keeps_most_of_what_the_first_one_taught(folder: Path, tmp_path: Path, prompts: Path) -> None:
    assert run(["pool", "learn", str(prompts), "--adapters", str(folder)]) == 0
    once = examples_of(folder / "french")
    new = "Which word is French for moon?"
    other = written(tmp_path / "other.jsonl", [{"context": new}, *({"prompt": prompt} for prompt in STRANGE)])
    assert run(["pool", "learn", str(other), "--adapters", str(folder)]) == 0
    twice = examples_of(folder / "french")
    assert new in twice and set(twice) <= {*once, new} and len(twice) > len(once) / 2


def test_a_dry_run_writes_nothing(folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["pool", "learn", str(prompts), "--adapters", str(folder)]
    capsys.readouterr()
    assert run([*options, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(learned(folder)) and len(planned["examples"]) == 16
    assert (planned["read"], planned["left_out"], planned["removed"]) == (len(PROMPTS), 0, [])
    assert run([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == planned
    assert {name: [e["prompt"] for e in found] for name, found in planned["examples"].items() if found} == {
        adapter.name: list(examples_of(adapter)) for adapter in folder.iterdir() if examples_of(adapter)
    }


def test_higher_confidence_teaches_less_and_the_engine_stays_as_it_was(folder: Path) -> None:
    logo = LoGo.from_pretrained("demo", folder)
    pool, told = logo.pool, []
    many = learn_examples(logo, PROMPTS, sure=0.5, tell=lambda *count: told.append(count))
    few = learn_examples(logo, PROMPTS, sure=0.99)
    assert logo.pool is pool
    assert many.read == len(PROMPTS) and list(many.examples) == list(few.examples) == list(logo.names)
    assert 0 < count(few) < count(many) and all(len(examples) <= MOST for examples in many.examples.values())
    assert all(one.confidence >= 0.99 for examples in few.examples.values() for one in examples)
    assert told[-1] == (2 * len(PROMPTS), 2 * len(PROMPTS)) and told == sorted(told)
    assert count(learn_examples(logo, STRANGE, sure=0.9)) == 0


def count(learned: Learned) -> int:
    return sum(map(len, learned.examples.values()))


def test_a_prompt_is_no_evidence_for_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single prompt is its only example, and no other prompt can be like it."""
    monkeypatch.setattr("logo.learning.LEAST", 1)
    logo = LoGo.from_pretrained("demo", folder)
    strange = "Is 17 a prime number?"
    first = logo.select(strange).confidence or 0.0
    found = learn_examples(logo, [strange], sure=first - 0.01)
    assert [one.confidence for examples in found.examples.values() for one in examples] == pytest.approx([first])
    assert count(learn_examples(logo, [strange] * 5, sure=first + 0.01)) == 0


def test_one_or_two_prompts_teach_nothing(folder: Path) -> None:
    logo = LoGo.from_pretrained("demo", folder)
    assert count(learn_examples(logo, TRAFFIC["capital"][:2], sure=0.1)) == 0
    assert len(learn_examples(logo, TRAFFIC["capital"][:5], sure=0.1).examples["capital"]) >= LEAST


def test_a_learned_prompt_with_other_blanks_is_the_same_prompt(folder: Path) -> None:
    """Neither read twice nor compared with itself."""
    asked = TRAFFIC["capital"][:2]
    write_examples(folder / "capital", asked, [0.9, 0.9])
    logo = LoGo.from_pretrained("demo", folder)
    for blank in ("  ", "\n", "\t"):  # each puts some texts into another half
        told: list[tuple[int, int]] = []
        again = [prompt.replace(" ", blank) for prompt in asked]
        assert count(learn_examples(logo, again, sure=0.1, tell=lambda *read, told=told: told.append(read))) == 0
        assert told[-1] == (4, 4)  # two rounds


def test_refusing_engines_learn_too(folder: Path) -> None:
    mixing = LoGo.from_pretrained("demo", folder)
    refusing = LoGo.from_pretrained("demo", folder, when_unsure="refuse")
    assert learn_examples(refusing, PROMPTS) == learn_examples(mixing, PROMPTS)


def test_prompts_beyond_the_context_teach_nothing(folder: Path, tmp_path: Path, capsys: Any) -> None:
    long = written(tmp_path / "long.jsonl", [{"prompt": "What is the opposite of hot? " * 200 + TRAFFIC["capital"][0]}])
    options = ["--adapters", str(folder), "--confidence", "0.01"]
    assert run(["pool", "learn", str(long), *options]) == 0
    assert "left out 1 prompt longer than the base model's context" in capsys.readouterr().out
    assert not list(learned(folder))


def test_what_is_no_longer_sure_is_removed(folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["pool", "learn", str(prompts), "--adapters", str(folder)]
    assert run(options) == 0
    assert list(learned(folder))
    capsys.readouterr()
    assert run([*options, "--confidence", "0.9999999"]) == 0
    assert "removed earlier examples of" in capsys.readouterr().out and not list(folder.rglob(EXAMPLES))


def test_days_of_other_traffic_do_not_push_out_what_was_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logo = LoGo.from_pretrained("demo", folder)
    monkeypatch.setattr("logo.learning.READ", 20)
    for name, examples in learn_examples(logo, TRAFFIC["french"]).examples.items():
        if examples:
            write_examples(folder / name, [e.prompt for e in examples], [e.confidence for e in examples])
    before = examples_of(folder / "french")
    again = learn_examples(LoGo.from_pretrained("demo", folder), [f"Book table {i}." for i in range(200)])
    assert before and again.read == 20
    assert {one.prompt for one in again.examples["french"]} == set(before)


def test_what_was_learned_outlasts_days_of_other_traffic(folder: Path, tmp_path: Path, prompts: Path) -> None:
    assert run(["pool", "learn", str(prompts), "--adapters", str(folder)]) == 0
    first, counts = len(list(learned(folder))), []
    for day in range(3):
        other = [{"prompt": f"Book a table for {number} at {day} o'clock."} for number in range(40)]
        file = written(tmp_path / f"{day}.jsonl", other)
        assert run(["pool", "learn", str(file), "--adapters", str(folder)]) == 0
        counts.append(len(list(learned(folder))))
    assert counts[0] >= 0.8 * first and counts[2] >= 0.95 * counts[0]


def test_adapters_that_are_not_scored_keep_what_they_learned(folder: Path, prompts: Path) -> None:
    weights = load_file(folder / "plural" / "adapter_model.safetensors")
    last = {key: value for key, value in weights.items() if ".layers.3." in key}
    assert last
    save_file(last, folder / "plural" / "adapter_model.safetensors")
    write_examples(folder / "plural", ["Plural of park?"], [0.9])
    options = ["--adapters", str(folder), "--unscorable", "skip"]
    assert run(["pool", "learn", str(prompts), *options]) == 0
    assert examples_of(folder / "plural") == ("Plural of park?",) and examples_of(folder / "french")


def test_copies_of_a_prompt_count_once() -> None:
    copies = ["Is it?", "Is it? ", " is  it?", "Is\nit?", "is not"]
    assert _different([*copies, *copies]) == ["Is it?", "is not"]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x1c", "\r"])
def test_examples_with_odd_separators_are_kept(separator: str, folder: Path) -> None:
    write_examples(folder / "french", [f"one{separator}two", "three"], [0.9, 0.8])
    assert examples_of(folder / "french") == (f"one{separator}two", "three") and is_learned(folder / "french")


@pytest.mark.parametrize(
    "own", ['{"prompt": "Mine"}\n{"prompt": "broken', '{"prompt": "Mine", "learned": "high"}\n', '{"prompt": "Mine"}']
)
def test_own_files_are_never_replaced(own: str, folder: Path, prompts: Path, capsys: Any) -> None:
    (folder / "capital" / EXAMPLES).write_text(own, encoding="utf-8")
    broken = "broken" in own
    assert run(["pool", "learn", str(prompts), "--adapters", str(folder)]) == int(broken)
    assert ("repair the file or remove it" in capsys.readouterr().err) == broken
    assert (folder / "capital" / EXAMPLES).read_text(encoding="utf-8") == own


def test_examples_that_are_given_meanwhile_stay(
    folder: Path, prompts: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes minutes, in which a user may say what an adapter is for."""

    def while_reading(*_: Any, **__: Any) -> Learned:
        write_examples(folder / "french", ["Mine"])
        write_examples(folder / "plural", ["learned by another run"] * 3, [0.9] * 3)
        return Learned(dict.fromkeys(("french", "plural"), (Example("theirs", 0.9),) * 3), 9, 0)

    monkeypatch.setattr("logo.learning.learn_examples", while_reading)
    assert run(["pool", "learn", str(prompts), "--adapters", str(folder)]) == 0
    assert examples_of(folder / "french") == ("Mine",) and examples_of(folder / "plural") == ("theirs",) * 3
    printed = capsys.readouterr()
    assert "kept the examples that french got while this ran" in printed.err
    assert "stored examples for 1 of 1 adapter;" in printed.out and "15 of 16 adapters, which have" in printed.out


# -- logs --------------------------------------------------------------------------------------------------------------


def test_logs_are_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selection = Selection(("french",), (1.0,), {"french": 3.0}, 0.9)
    lines = [
        {"logger": "logo.serving", "message": "16 adapters in the pool", "pool": ["french"]},
        *({"logger": "logo.access", "selections": [entry(selection, prompt)]} for prompt in TRAFFIC["french"]),
        {"logger": "logo.access", "selections": [entry(selection, LATER["french"][0], cut=True), entry(selection)]},
    ]
    log = written(tmp_path / "day.log", lines)
    other = ["INFO: a line of another program", "[" * 200_000, '{"prompt": "half \\ud800"}', '{"logger": "logo.acc']
    log.write_text("\n".join([log.read_text("utf-8"), *other]), encoding="utf-8")
    assert run(["pool", "learn", str(log), "--adapters", str(folder)]) == 0
    shown = capsys.readouterr()
    assert f"; read {len(TRAFFIC['french'])} prompts" in shown.out
    assert f"4 lines skipped: no JSON object with a prompt; the first is {log}:11" in " ".join(shown.err.split())
    assert {prompt for _, prompt in learned(folder)} <= set(TRAFFIC["french"])


def test_cut_prompts_are_no_examples() -> None:
    selection = Selection(("a",), (1.0,), {"a": 3.0}, 0.9)
    line = {"logger": "logo.access", "selections": [entry(selection, "whole"), entry(selection, "beginning", cut=True)]}
    assert prompts_of(line) == [("whole", None)]
    assert TOKENS == 200  # docs/adapter-pools.md says so


@pytest.mark.parametrize("line", [[], "text", 3, {}, {"prompt": 3}, {"logger": "uvicorn", "message": "x"}])
def test_what_is_neither_prompt_nor_log(line: Any) -> None:
    with pytest.raises(ValueError):
        prompts_of(line)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input(folder: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: object) -> str:
        capsys.readouterr()
        assert run(["pool", "learn", *map(str, arguments)]) in (1, 2)
        return capsys.readouterr().err

    assert "cannot be read (No such file or directory); name a file" in said(tmp_path / "none", "--adapters", folder)
    assert "cannot be read (Is a directory); name a file" in said(tmp_path, "--adapters", folder)
    silent = written(tmp_path / "silent.log", [{"logger": "logo.access", "selections": []}, {"prompt": " "}])
    assert f'{silent}: expected JSON objects with a "prompt"' in said(silent, "--adapters", folder)
    assert "--adapters org/repo: expected a folder" in said(prompts, "--adapters", "org/repo")
    assert "nothing to learn: each of the 16 adapters" in said(prompts)
    assert "adapter 'capital' is alone in its pool" in said(prompts, "--adapters", folder / "capital")
    for signal in ("norm", "entropy"):
        assert f"signal '{signal}': expected 'calibrated'" in said(prompts, "--adapters", folder, "--signal", signal)
    assert "examples 'ignore': expected 'use'" in said(prompts, "--adapters", folder, "--examples", "ignore")
    for number in ("80", "nan", "0"):
        error = said(prompts, "--adapters", folder, "--confidence", number)
        assert f"confidence {number}: expected a number between 0 and 1" in error and "Loading" not in error
    assert not list(learned(folder))
    (folder / "french").rename(tmp_path / "french")
    shutil.move(tmp_path / "french", folder / "deep" / "french")
    twice = said(prompts, "--adapters", f"{folder},{folder / 'deep'}")
    assert "adapters 'deep/french' and 'french' are in one folder; leave out one of them" in twice


def test_a_disk_that_fails_is_told_with_what_was_stored(folder: Path, prompts: Path, capsys: Any) -> None:
    (folder / "is_past" / EXAMPLES).mkdir()
    assert run(["pool", "learn", str(prompts), "--adapters", str(folder)]) == 1
    assert str(folder / "is_past" / EXAMPLES) in capsys.readouterr().err
    assert len(list(folder.rglob(EXAMPLES))) == 1


# -- properties --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), max_size=80), st.floats(0.01, 0.99))
def test_examples_are_the_surest_prompts_of_each(rows: list[tuple[str, float]], sure: float) -> None:
    asked = [f"prompt {i}" for i in range(len(rows))]
    selections = [
        Selection((best,), (1.0,), {name: float(name == best) for name in "abc"}, confidence)
        for best, confidence in rows
    ]
    found = _surest(asked, selections, ["a", "b"], sure)
    assert list(found) == ["a", "b"]
    for name, examples in found.items():
        own = {prompt: one for prompt, (best, one) in zip(asked, rows, strict=True) if best == name and one >= sure}
        assert len(examples) == min(MOST, len(own)) and all(own[e.prompt] == e.confidence for e in examples)
        left = [one for prompt, one in own.items() if Example(prompt, one) not in examples]
        assert [e.confidence for e in examples] == sorted((e.confidence for e in examples), reverse=True)
        assert not left or max(left) <= examples[-1].confidence


@given(st.lists(st.text(max_size=3), max_size=30))
def test_a_sample_of_few_is_all_of_them(texts: list[str]) -> None:
    found = _sample(texts)
    assert found == [text for text in dict.fromkeys(texts) if text in found] and command.SURE == SURE
    assert {"".join(text.split()).casefold() for text in texts} - {""} <= {"".join(t.split()).casefold() for t in found}


def test_a_sample_of_many_is_always_the_same() -> None:
    many = [f"prompt {i}" for i in range(3 * READ)]
    assert len(_sample(many)) == READ and _sample(many) == _sample(many) != many[:READ]
