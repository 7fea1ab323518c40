"""`logo data`: every declaration of the package from a Hub, one's own, templates, the draw, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hub_server import GOOD_TOKEN, Commit, HubServer, Repo
from logo import register_metric
from logo.cli.app import run
from logo.errors import DataError
from logo.evaluation.datasets import OFFICIAL, dataset_file, find_datasets
from logo.evaluation.metrics import metric_kind
from logo.evaluation.sources.declarations import DatasetOrigin, Declaration, load_declaration, packaged
from logo.evaluation.sources.prepare import RECORD, Instance, drawn_from, prepare
from logo.evaluation.sources.templates import wording
from test_rows import load_rows
from warm import logo as logo_command
from written import write_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def logo(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(["data", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def lines(name: str, split: str = "test", data: Path = Path("data")) -> list[dict[str, Any]]:
    return [json.loads(line) for line in dataset_file(data, name, split).read_text("utf-8").splitlines()]


def test_there_is_one_for_every_official_name_and_code_task() -> None:
    assert tuple(packaged())[: len(OFFICIAL)] == OFFICIAL
    others = list(packaged())[len(OFFICIAL) :]
    assert len(others) == 13 and all(name.startswith("code_x_glue.") for name in others)
    for name, made in packaged().items():
        assert (made.name, made.metric) == (name, metric_kind(name))
        assert "/" in made.source.repo and made.source.train and made.citation and made.licence
        assert made.homepage.startswith("https://") and bool(made.references) == (made.metric == "rouge")


# -- tiny Parquet files of every source that a declaration names, with the columns that are read, all made up here


def triples(i: int) -> list[list[str]]:
    return [[f"Bridge {i}", "length", f"{i} m"], [f"Bridge {i}", "crosses", "River, the wide one"]]


def bridge(i: int) -> dict[str, Any]:
    return {"target": f"It is {i} m.", "references": [f"It is {i} m.", f"{i} m it is."]}


def hub_rows(name: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows as the repository on the Hub has them."""
    main, _, sub = name.partition(".")
    numbers = range(first, first + count)
    match main:
        case "bbh":
            return [{"input": f"not ( {i} ) is", "target": str(i % 2 == 0)} for i in numbers]
        case "wmt14" | "wmt16":
            return [{"translation": {code: f"{code} sentence {i}." for code in sub.split("-")}} for i in numbers]
        case "ai2_arc":
            return [arc(i) for i in numbers]
        case "anli":
            return [{"premise": f"It is {i}.", "hypothesis": f"{i}?", "label": i % 3} for i in numbers]
        case "code_x_glue":
            return [code_row(sub, i) for i in numbers]
    return [HUB[name](i) for i in numbers]


def arc(i: int) -> dict[str, Any]:
    labels = list("1234") if i % 5 == 0 else list("ABCD")
    asked = {"id": f"Q{i}", "question": f"Which is number {i}?", "answerKey": labels[i % 4]}
    return asked | {"choices": {"text": list("wxyz"), "label": labels}}


def code_row(sub: str, i: int) -> dict[str, Any]:
    if sub.startswith("code_to_text"):
        return {"code_tokens": [f"tok{i}", "(", "x", ")"], "docstring_tokens": ["Returns", str(i), "."]}
    if sub.startswith("text_to_text"):
        return {"id": i, "source": f"Klik {i}\n", "target": f"Click {i}\n"}
    if sub.startswith("text_to_code"):
        nl = f"adds {i} concode_field_sep PlaceHolder value concode_elem_sep int n"
        return {"id": i, "nl": nl, "code": f"int f ( ) {{ return {i} ; }}"}
    if sub.startswith("code_to_code"):
        return {"id": i, "java": f"int f(){{return {i};}}\n", "cs": f"int F(){{return {i};}}\n"}
    return {"id": i, "buggy": f"int f ( ) {{ {i} }}\n", "fixed": f"int f ( ) {{ return {i} ; }}\n"}


HUB: dict[str, Callable[[int], dict[str, Any]]] = {
    # Two rows for each set of concepts: one gold text each.
    "gem.common_gen": lambda i: {
        "concept_set_idx": i // 2,
        "concepts": ["dog", f"tree{i // 2}"],
        "target": f"A dog, {i}.",
    },
    "gem.dart": lambda i: {"gem_id": f"d{i}", "tripleset": triples(i), "subtree_was_extended": False, **bridge(i)},
    "gem.e2e_nlg": lambda i: {
        "meaning_representation": f"name[Inn {i}], food[Fish]",
        "target": f"Inn {i} has fish.",
        "references": [f"Inn {i} has fish.", f"Fish at Inn {i}."],
    },
    "gem.web_nlg": lambda i: {"input": [" | ".join(triple) for triple in triples(i)], **bridge(i)},
    "nq.natural-questions": lambda i: {"question": f"what is number {i}", "answer": [str(i), f"number {i}"]},
    "tqa.rc": lambda i: {
        "question": f"What is number {i}?",
        "answer": {"value": str(i), "aliases": [f"No {i}", str(i)]},
    },
    "glue.qnli": lambda i: {"question": f"How many is {i}?", "sentence": f'He said "{i}".', "label": i % 2, "idx": i},
}


def write_hub(root: Path, name: str, count: int = 12) -> Path:
    """The repository's Parquet files, where its declaration says; returns its folder. Where splits are the same, there
    is one file."""
    source = packaged()[name].source
    for split, first in {source.test: 0, source.train: 1000 if source.train != source.test else 0}.items():
        converted = source.repo.startswith("GEM/")  # to Parquet, by the Hub itself
        folder = root / source.repo / (source.config if converted or source.config != "default" else "data")
        file = folder / split / "0000.parquet" if converted else folder / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(hub_rows(name, count, first)), file)
    return root / source.repo


def client(hub: HubServer, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return hub.run([*logo_command(), "data", *arguments], Path("home").absolute(), **environment)


@pytest.mark.slow
def test_all_from_the_hub_through_its_own_client(tmp_path: Path) -> None:
    """The same bytes as ever for the same rows of the sources, some that are refused, and what is in the cache."""
    command = ("prepare", "--limit", "5", "--train-limit", "4")
    with HubServer({}) as hub:
        for name, made in packaged().items():  # tiny files in the schema of every source, at its revision
            at, repo = write_hub(tmp_path / "hub", name), f"datasets/{made.source.repo}"
            hub.add(repo, at, made.source.revision)
            if re.fullmatch("[0-9a-f]{40}", made.source.revision):
                commit = replace(Commit.of(at), sha=made.source.revision)
                hub.repos[repo] = Repo({made.source.revision: commit})
        anli = tmp_path / "hub/facebook/anli"
        (anli / "anli.py").write_text("raise SystemExit('a loading script was run')")
        hub.repos["datasets/lukaemon/bbh"].gated = True
        refused = client(hub, *command)
        assert refused.returncode == 1
        assert len(refused.stdout.splitlines()) == 39 - 8
        *errors, last = refused.stderr.splitlines()
        assert len(errors) == 8 and last == "logo: 8 of 39 datasets could not be prepared"
        start = "logo: error: dataset 'bbh.boolean_expressions': Hub repo datasets/lukaemon/bbh: access is gated;"
        assert errors[0].startswith(start) and f"{hub.url}/datasets/lukaemon/bbh" in errors[0]
        assert not [name for name in hub.fetched() if not name.endswith(".parquet")]  # only the files of the splits
        allowed = client(hub, *command, HF_TOKEN=GOOD_TOKEN)
        assert allowed.returncode == 0, allowed.stderr
        assert len(re.findall(r": 5 test \+ 4 train rows \(", allowed.stdout)) == 8
        assert len(re.findall(r": kept, its files", allowed.stdout)) == 31
        hub.clear()
        again = ("prepare", "gem.dart", "mine.x", "--source", "mine.yaml", "--data-dir", "again", *command[1:])
        Path("mine.yaml").write_text(MINE.replace("{repo: ., test: rows.jsonl}", "{repo: wmt/wmt9, test: test}"))
        offline = client(hub, *again, HF_HUB_OFFLINE="1")
        assert offline.returncode == 1 and hub.requests == []
        assert "dataset 'mine.x': Hub repo datasets/wmt/wmt9: not in the cache, and offline" in offline.stderr
        (tmp_path / "empty").mkdir()
        sha = packaged()["anli.r1"].source.revision
        hub.repos["datasets/facebook/anli"] = Repo({sha: replace(Commit.of(tmp_path / "empty"), sha=sha)})
        del hub.repos["datasets/mandarjoshi/trivia_qa"]
        broken = client(hub, "prepare", "anli.r1", "tqa", "--data-dir", "none", HF_HOME=str(tmp_path / "new"))
        none, absent, _ = broken.stderr.splitlines()
        assert f"facebook/anli at revision {sha!r}: expected a file plain_text/test_r1-*.parquet or " in none
        assert "dataset 'tqa.rc': Hub repo datasets/mandarjoshi/trivia_qa: not found at" in absent
    files = sorted(Path("data").rglob("*.jsonl"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to('data').as_posix()}\n".encode() + file.read_bytes())
    # As 6474f39 wrote them.
    assert (len(files), digest.hexdigest()) == (78, "9360943852a283ee9e1801e48d3dfb1c3277fdf498916b92b9e3437a8729d167")
    assert lines("gem.dart", data=Path("again")) == lines("gem.dart")
    source = json.loads(dataset_file("data", "anli.r1").with_name(RECORD).read_text())["source"]
    assert source["commit"] == source["revision"] == packaged()["anli.r1"].source.revision
    for name in packaged():
        for split, count in (("test", 5), ("train", 4)):
            rows = load_rows("data", name, split=split)
            assert len({row.context for row in rows}) == count
            assert all(isinstance(row.completion, tuple) == (metric_kind(name) == "em_multi") for row in rows)
        assert not {row["context"] for row in lines(name)} & {row["context"] for row in lines(name, "train")}


def test_boolean_expressions_are_laid_out_as_the_official_rows() -> None:
    official = load_rows(Path(__file__).parent / "data", "bbh.boolean_expressions")
    head, tail = "Evaluate the result of a random Boolean expression.\n\nQ: ", "\nA:"
    rows = [{"input": row.context.removeprefix(head).removesuffix(tail), "target": row.completion} for row in official]
    texts = wording(packaged()["bbh.boolean_expressions"])
    made = [(found["context"], found["completion"]) for row in rows if (found := texts(row))]
    assert made == [(row.context, row.completion) for row in official]


def test_the_draw_does_not_depend_on_order_or_on_other_rows() -> None:
    every = [Instance(f"Q{i}", "a", (), f"Q{i}") for i in range(200)]
    drawn = drawn_from(every, 50, 3)
    # A change of these would change everybody's rows.
    assert [one.context for one in drawn_from(every[:20], 5, 0)] == ["Q6", "Q2", "Q10", "Q7", "Q15"]
    assert [one.context for one in drawn_from(every[:20], 5, 7)] == ["Q8", "Q17", "Q14", "Q19", "Q16"]
    random.Random(0).shuffle(every)
    assert drawn_from(every, 50, 3) == drawn
    assert drawn_from(every[:100], 50, 3) == [i for i in drawn_from(every, 200, 3) if i in every[:100]][:50]
    rest = drawn_from(every, 200, 3, without=drawn)
    assert len(rest) == 150 and not {i.context for i in rest} & {i.context for i in drawn}


# --- a declaration of one's own

MINE = """
name: mine.x
licence: none
source: {repo: ., test: rows.jsonl}
context: "Q: {{ q }}"
completion: "{{ a }}"
"""


def declared(text: str = MINE) -> Declaration:
    Path("mine.yaml").write_text(text, encoding="utf-8")
    return load_declaration(Path("mine.yaml"))


def put(*rows: dict[str, Any]) -> None:
    write_rows(Path("rows.jsonl"), rows)


def test_rows_of_one_prompt_are_one_with_the_references_of_all() -> None:
    """Without references the first gold text stays, and others are counted."""
    put({"q": "a", "a": "x", "r": ["y", "x"]}, {"q": "b", "a": "", "r": []}, {"q": "a", "a": "z", "r": None})
    record = prepare(declared(MINE + 'references: "{{ r }}"\n'), Path("data"))
    assert lines("mine.x") == [{"context": "Q: a", "completion": "x", "references": ["x", "y", "z"]}]
    assert (record["unusable_rows"], record["other_golds"], record["rows"]) == (1, 0, {"test": 1})
    assert prepare(declared(), Path("data"))["other_golds"] == 1
    assert lines("mine.x") == [{"context": "Q: a", "completion": "x"}]


def test_train_rows_of_the_same_split_are_those_that_test_rows_leave() -> None:
    put(*({"q": f"{i}", "a": "x"} for i in range(8)))
    text = MINE.replace("test: rows.jsonl", "test: rows.jsonl, train: rows.jsonl")
    assert prepare(declared(text), Path("data"), rows=6, train_rows=4)["rows"] == {"test": 6, "train": 2}
    assert len({row["context"] for row in lines("mine.x") + lines("mine.x", "train")}) == 8
    assert prepare(declared(text), Path("data"), rows=6, train_rows=0)["rows"] == {"test": 6}
    assert not dataset_file("data", "mine.x", "train").exists()


def test_a_metric_that_the_name_does_not_say_is_written_beside_the_rows(plugins_forgotten: None) -> None:
    """And goes with it when another one is declared."""
    register_metric("length")(lambda prediction, golds: float(len(prediction)))
    put({"q": "a", "a": "x"})
    for metric in ("rouge", "em", "length"):
        prepare(declared(f"{MINE}metric: {metric}\n"), Path("data"))
        [found] = find_datasets("data")
        assert found.metric == metric and found.file.with_suffix(".yaml").exists() == (metric != "em")


def test_what_does_not_fit_is_named_and_what_is_there_stays() -> None:
    put({"q": "a", "a": "x"})
    prepare(declared(), Path("data"))
    before = dataset_file("data", "mine.x").read_bytes()
    for file, content, message in (
        ("rows.jsonl", '{"q": "a", "b": "x"}', r": row 1: 'completion': 'a' is undefined; the row has 'q', 'b'; fix"),
        ("rows.jsonl", '{"q": "a", "a": null}', "none of 1 rows has a prompt and a gold text; is this the right split"),
        ("rows.jsonl", '{"q": "a"', r"rows\.jsonl: cannot be read as jsonl \("),
        ("rows.json", "[1]", r"rows\.json: cannot be read as json \("),
        ("rows.txt", "", r"rows\.txt: expected a file that ends in \.parquet, \.json, \.jsonl"),
        ("no.jsonl", None, r"expected a file no\.jsonl of test rows, found none; fix the declaration"),
    ):
        if content is not None:
            Path(file).write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            prepare(declared(MINE.replace("rows.jsonl", file)), Path("data"))
        assert "'mine.x'" in str(caught.value)
    assert dataset_file("data", "mine.x").read_bytes() == before


@pytest.mark.slow
def test_a_mistake_in_a_declaration_is_named() -> None:
    for old, new, message in (
        ("name: mine.x", "name: ../x.y", "dataset '../x.y': expected a name like"),
        ("licence: none\n", "", "licence: expected this key beside name, source, context, completion, found none"),
        ("licence:", "license:", r"license: expected one of name, .* \(did you mean 'licence'\?\)"),
        ("licence: none", "licence: none\nmetric: blue", r"metric: expected a metric \(em, .*found 'blue'"),
        ("licence: none", "licence: !!python/object/apply:os.system [echo]", r"licence: expected text, found \['"),
        ("test: rows.jsonl", "test: /rows.jsonl", "source.test: expected a split, or a path below source.repo, found"),
        ("{repo: ., test: rows.jsonl}", "rows.jsonl", "source: expected a mapping of names to texts, found 'rows"),
        ('"{{ a }}"', '""', "completion: expected text, found ''"),
        ("source: {", "source: [{", r"mine.yaml: expected YAML in UTF-8, found .*\(line "),
        (MINE, "[" * 5000, "mine.yaml"),
    ):
        assert old in MINE
        with pytest.raises(DataError, match=message) as caught:
            declared(MINE.replace(old, new))
        assert str(caught.value).startswith("mine.yaml: ") and "\n" not in str(caught.value)


def test_words_that_yaml_would_turn_into_values_stay_words() -> None:
    found = declared(MINE + "fields: {a: no, b: 007, c: 2020-01-01}\ngroup: yes\nnotes: null\n")
    assert found.fields == {"a": "no", "b": "007", "c": "2020-01-01"} and (found.group, found.notes) == ("yes", "null")
    assert found.draw_by == found.context == "Q: {{ q }}" and found.metric == "em"


def test_values_of_json_are_as_they_are_written() -> None:
    """And a name that some rows lack is null there."""
    for column in (["1999-12-31", "2020-01-01T00:00:00"], ["2020-01-01T10:30:00Z"], [12, 1.5, 0]):
        rows = [*({"q": f"{value}", "a": {"b": [value]}} for value in column), {"q": "more"}]
        put(*rows)
        Path("rows.json").write_text(json.dumps(rows, indent=1))
        for name in ("rows.jsonl", "rows.json"):
            made = MINE.replace("{{ a }}", "{{ a.b[0] }}").replace("rows.jsonl", name)
            assert prepare(declared(made), Path("data"))["unusable_rows"] == 1
            assert {one["completion"] for one in lines("mine.x")} == set(map(str, column))


# --- templates

ROW: dict[str, Any] = {
    "q": "What?",
    "n": 2,
    "none": None,
    "no items": [],
    "answer": {"value": "a", "aliases": ["b ", "a"]},
    "choices": [{"text": "x", "label": "A"}, {"text": " y", "label": "B"}],
    "triples": [["s", "r", "o"], ["t", "r", "p"]],
}


def texts_of(row: dict[str, Any], context: str, completion: str = "x", made: str = "'x'", references: str = "") -> Any:
    source = DatasetOrigin("a/b", "test")
    return wording(Declaration("mine.x", "none", source, context, completion, references, context, {"made": made}))(row)


def test_fields_are_expressions() -> None:
    """One expression may be a list."""
    for expression, text in (
        ("q", "What?"),
        ("answer.aliases[1]", "a"),
        ("choices | map(attribute='text') | lettered | join(';')", "(A) x;(B) y"),
        ("letters[(choices | map(attribute='label') | list).index('B')]", "B"),
        ("{2: 'two'}[n]", "two"),
        ("triples | map('join', '-') | join('; ')", "s-r-o; t-r-p"),
        ("triples | sum(start=[]) | unique | join", "srotp"),
        ("'{{ x }}{% for %}<&>'", "{{ x }}{% for %}<&>"),
    ):
        assert texts_of(ROW, "= {{ made }}", made=expression)["context"] == f"= {text}"
    found = texts_of(ROW, "Q", "{{ answer.aliases + ['', 'a'] }}", references="{{ q }}")
    assert (found["completion"], found["references"]) == (["b", "a", "", "a"], "What?")


@pytest.mark.parametrize("blank", ["none", "none.deeper[0].still", "row['no items']", "' '", "none | join(',')"])
def test_a_row_that_lacks_a_text_is_left_out(blank: str) -> None:
    for texts in (("Q: {{ q }}", "{{ made }}"), ("Q: {{ made }}", "x"), ("Q", "a: {{ made }}")):
        found = texts_of(ROW, *texts, made=blank)
        assert found is None or found["completion"] == []
    assert not texts_of(ROW, "Q", "a", blank, "{{ made }}")["references"]


def test_what_a_template_must_not_or_cannot_is_named() -> None:
    for expression, message in (
        ("quest", "'made': 'quest' is undefined; the row has 'q', 'n', 'none', 'no items', 'answer', "),
        ("triples[7]", "'made': list object has no element 7"),
        ("'ABC'.index(q)", "'made': substring not found"),
        ("answer", "'context': expected text, found {'value': .*; `join` makes text of a list"),
        (r"'\ud83d'", "'context': expected text, found half of a surrogate pair"),
        ("q +", r"expected Jinja2, found 'q \+' \("),
        ("[1, 2] | random", "No filter named 'random'"),
        ("cycler.__init__.__globals__.os.system('x')", "'made': .*unsafe"),
        ("'{0.__class__}'.format(q)", "'made': .*unsafe"),
        ("triples.append(1)", "'made': .*unsafe"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            texts_of(ROW, "{{ made }}", made=expression)
        assert "\n" not in str(caught.value)


# --- the command


def test_it_lists_all_and_what_is_there_besides(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = logo(capsys, "list")
    found = out.splitlines()
    assert code == 0 and len(found) == 1 + 39 and "39 datasets, 0 with rows in data" in err
    assert found[0].split() == ["dataset", "group", "metric", "test", "train", "source", "licence"]
    assert [line.split()[0] for line in found[1:27]] == list(OFFICIAL)
    assert found[1].split() == ["bbh.boolean_expressions", "bbh", "em", "-", "-", "lukaemon/bbh", "MIT"]
    write_rows(dataset_file("data", "mine.rows"), [{"context": "a", "completion": "b"}])
    ours, own = json.loads(logo(capsys, "list", "anli.r1", "mine.*", "--json")[1])
    assert (ours["name"], ours["rows"], ours["licence"]) == ("anli.r1", None, "CC BY-NC 4.0")
    assert (own["name"], own["rows"], own["licence"]) == ("mine.rows", 1, None)


def test_prepare_keeps_what_is_there_until_told(capsys: pytest.CaptureFixture[str]) -> None:
    put(*({"q": f"{i}", "a": "x"} for i in range(20)))
    declared(MINE.replace("test: rows.jsonl", "test: rows.jsonl, train: rows.jsonl"))
    command = ["prepare", "--source", "mine.yaml", "--train-limit", "4", "--limit"]
    assert logo(capsys, *command, "5") == (0, "mine.x: 5 test + 4 train rows\n", "")
    first = lines("mine.x")
    kept = (0, "mine.x: kept, its files are there (--overwrite draws anew)\n", "")
    assert logo(capsys, *command, "6") == kept and lines("mine.x") == first
    train = dataset_file("data", "mine.x", "train").read_bytes()
    dataset_file("data", "mine.x").unlink()
    assert logo(capsys, *command, "6") == kept and dataset_file("data", "mine.x", "train").read_bytes() == train
    assert logo(capsys, *command, "6", "--overwrite")[0] == 0 and lines("mine.x") != first


def test_a_wrong_call_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("")
    for arguments, code, message in (
        ("prepare bbh.navigat", 2, "dataset 'bbh.navigat': not declared (did you mean 'bbh.navigate'?)"),
        ("prepare --limit 0", 2, "--limit"),
        ("prepare --source no.yaml", 1, "no.yaml: cannot be read (No such file or directory)"),
        ("prepare anli.r1 --data-dir taken", 1, "cannot be written"),
    ):
        found, out, err = logo(capsys, *arguments.split())
        assert (found, out) == (code, "")
        assert len(err.splitlines()) == 1 and err.startswith("logo: error: ") and message in err


def test_the_example_of_the_page_works(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/research.md").read_text()
    Path("capitals.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0])
    cities = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi"}
    rows = [{"country": one, "capital": city} for one, city in [*cities.items(), ("France", "Lyon")]]
    Path("capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [line] = re.findall(r"^    logo data (prepare --source capitals.*)$", page, flags=re.MULTILINE)
    code, out, err = logo(capsys, *line.split())
    more = "1 row with an earlier prompt and another gold text left out"
    assert (code, out) == (0, f"mine.capitals: 3 test rows ({more})\n"), err
    for row in lines("mine.capitals"):
        country = row["context"].removeprefix("Question: What is the capital of ").removesuffix("?\nAnswer:")
        assert row["completion"] == cities[country]


def test_an_own_declaration_takes_the_place_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    write_hub(Path(), "anli.r1")
    ours = (ROOT / "src/logo/evaluation/sources/files/anli.r1.yaml").read_text()
    Path("mended.yaml").write_text(ours.replace("Does this", "Can this").replace("facebook/anli", "./facebook/anli"))
    command = ["prepare", "--source", "mended.yaml", "--limit", "2", "--train-limit", "0"]
    assert logo(capsys, *command) == (0, "anli.r1: 2 test rows\n", "")
    assert all("Can this paragraph" in row["context"] for row in lines("anli.r1"))
