"""Templates, readers and declaration files, most of it about input that is not as it should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo import register_metric
from logo.errors import DataError, UsageError
from logo.evaluation.sources.declarations import Declaration, Layout
from logo.evaluation.sources.instances import Instance, Instances, make_instances
from logo.evaluation.sources.loading import chosen, load_declaration, packaged
from logo.evaluation.sources.readers import matching, read_raw
from logo.evaluation.sources.templates import RowError, Wording

NAME = st.sampled_from(["a", "B", "_c", "d1", "_", "long_name", "from", "class", "items"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1, max_size=12)

# --- templates


def declaration(
    context: str, completion: str = "x", fields: Mapping[str, str] | None = None, **templates: str
) -> Declaration:
    texts = {"context": context, "completion": completion, "draw_by": context, **templates}
    return Declaration("mine.words", "own", "em", "none", "", "", "", None, Layout({}, fields or {}), texts, "")


def instances(row: Mapping[str, Any], *texts: str, fields: Mapping[str, str] | None = None, **more: str) -> Instances:
    wording = Wording(declaration(*texts, fields=fields, **more))
    return make_instances("mine.words", wording, [("x.json: row 1", row)])


def only(row: Mapping[str, Any], *texts: str, fields: Mapping[str, str] | None = None, **more: str) -> Instance:
    [found] = instances(row, *texts, fields=fields, **more).items
    return found


def field(expression: str) -> str:
    """What a field is in the prompt of the row below."""
    return only(ROW, "= {{ made }}", fields={"made": expression}).context.removeprefix("= ")


ROW: dict[str, Any] = {
    "q": "What?",
    "n": 2,
    "none": None,
    "no items": [],
    "answer": {"value": "a", "aliases": ["b ", "a"]},
    "choices": [{"text": "x", "label": "A"}, {"text": " y", "label": "B"}],
    "set": "dog#tree# run",
    "triples": [["s", "r", "o"], ["t", "r", "p"]],
}


@given(
    literals=st.lists(TEXT.map(lambda text: text.replace("{", "").replace("\r", "")), min_size=2, max_size=4),
    values=st.dictionaries(NAME, TEXT.filter(bool), min_size=3, max_size=3),
)
def test_a_prompt_is_its_template_with_values_in_place_of_names(literals: list[str], values: dict[str, str]) -> None:
    pairs = list(zip(values, literals[1:], strict=False))
    text = literals[0] + "".join(f"{{{{ {name} }}}}{after}" for name, after in pairs)
    expected = literals[0] + "".join(values[name].strip() + after for name, after in pairs)
    assert only(values, "Q: " + text).context == "Q: " + expected


@pytest.mark.parametrize("text", ["{{ x }}", "{% for %}", "{# x #}", "{x}", "<&>"])
def test_what_looks_like_a_template_in_a_row_is_text(text: str) -> None:
    made = only({"q": text}, "Q: {{ q }}", "{{ [q, q + '!'] }}")
    assert (made.context, made.completion) == (f"Q: {text}", (text, f"{text}!"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ q.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('x') }}",
        "{{ '{0.__class__}'.format(q) }}",
        "{{ triples.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}a{% endfor %}",
    ],
)
@pytest.mark.parametrize("key", ["context", "completion", "references"])
def test_a_template_cannot_leave_its_sandbox(key: str, template: str) -> None:
    with pytest.raises(DataError, match=r"x\.json: row 1: .*; the row has 'q', 'n'") as caught:
        instances(ROW, **{"context": "Q", key: template})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("q", "What?"),
        ("n", "2"),
        ("row['n'] + 0.5", "2.5"),
        ("answer.aliases[1]", "a"),
        ("choices | map(attribute='text') | lettered | join(';')", "(A) x;(B) y"),
        ("([answer.value] + answer.aliases) | join", "aba"),
        ("set.split('#') | join(', ')", "dog, tree, run"),
        ("letters[(choices | map(attribute='label') | list).index('B')]", "B"),
        ("{2: 'two'}[n]", "two"),
        ("triples | map('join', '-') | join('; ')", "s-r-o; t-r-p"),
        ("triples | sum(start=[]) | unique | join", "srotp"),
    ],
)
def test_fields_are_expressions(expression: str, text: str) -> None:
    assert field(expression) == text


@pytest.mark.parametrize("blank", ["none", "none.deeper[0].still", "row['no items']", "''", "none | join(',')"])
def test_a_row_that_lacks_a_text_is_left_out(blank: str) -> None:
    for texts in (("Q: {{ q }}", "{{ made }}"), ("Q: {{ made }}", "x"), ("Q", "a: {{ made }}")):
        with pytest.raises(DataError, match="none of 1 rows has a prompt and a gold text"):
            instances(ROW, *texts, fields={"made": blank})
    assert only(ROW, "Q", "a", references="{{ made }}", fields={"made": blank}).references == ("a",)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("quest", "'made': 'quest' is undefined; the row has 'q', 'n', 'none', 'no items', 'answer', .*; fix"),
        ("answer.val", "'made': 'dict object' has no attribute 'val'"),
        ("triples[7]", "'made': list object has no element 7"),
        ("{1: 'a'}[n]", "'made': dict object has no element 2"),
        ("'ABC'.index(q)", "'made': substring not found"),
        ("answer", "'context': expected text, found {'value': .*; `join` makes text of a list"),
        ("triples", "'context': expected text, found "),
        ("q +", "expected Jinja2, found 'q \\+' .*; fix the declaration"),
    ],
)
def test_what_a_field_does_not_find_is_named(expression: str, message: str) -> None:
    with pytest.raises(DataError, match=f"dataset 'mine.words': .*{message}"):
        field(expression)


def test_one_expression_may_be_a_list() -> None:
    made = only(ROW, "Q", "{{ answer.aliases + ['', 'a'] }}", references="{{ q }}")
    assert (made.completion, made.references) == (("b", "a"), ("b", "a", "What?"))
    assert only(ROW, "Q", "{{ answer.value }}{{ q }}").completion == "aWhat?"


# --- readers


def rows_of(root: Path, pattern: str) -> list[Any]:
    return [row for _, row in read_raw(root, matching((pattern,), root))]


@given(table=st.lists(st.tuples(LINE, LINE), min_size=1, max_size=5))
def test_text_formats_give_back_the_text(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    """Whatever looks like a number, a date or a missing value to other readers is text here."""
    import csv

    root = tmp_path_factory.mktemp("raw")
    rows = [{"a": a, "b": b} for a, b in table]
    (root / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "list.json").write_text(json.dumps(rows, indent=1))
    (root / "lines.json").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    with open(root / "x.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["a", "b"])
        writer.writeheader()
        writer.writerows(rows)
    assert rows_of(root, "x.jsonl") == rows_of(root, "lines.json") == rows_of(root, "list.json") == rows
    assert rows_of(root, "x.csv") == rows


def test_what_other_readers_would_guess_at(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('\ufeffa,b\n007,NA\n2020-01-01,"x\ny"\n', encoding="utf-8")
    (tmp_path / "x.tsv").write_text('a\tb\n"quoted\tnull\n', encoding="utf-8")
    assert rows_of(tmp_path, "x.csv") == [{"a": "007", "b": "NA"}, {"a": "2020-01-01", "b": "x\ny"}]
    assert rows_of(tmp_path, "x.tsv") == [{"a": '"quoted', "b": "null"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "[1, 2", r"x\.json: row 1: Expecting ',' delimiter: line 1 column 6"),
        ("x.json", '{"a": 1,\n"b": {}}', "expected a list of rows, found dict"),
        ("x.json", "[" * 200_000, "maximum recursion depth"),
        ("x.jsonl", '{"a": 1}\n{"a"\n', r"x\.jsonl: row 2: Expecting ':' delimiter"),
        ("x.jsonl", '{"a": 1}\n[2]\n', r"x\.jsonl: row 2: expected an object, found \[2\]"),
        ("x.csv", "a,b\n1,2\n3\n", r"x\.csv: row 2: line 3: expected 2 cells \(a, b\)"),
        ("x.csv", 'a,b\n1,"2\n', "unexpected end of data"),
        ("x.xml", "<r/>", r"expected a file that ends in \.parquet, .*, found \.xml"),
        ("x.parquet", "PAR1 no more", "cannot be read as Parquet"),
        ("x.csv", b"a\n\xff\n", r"expected UTF-8, found other bytes at byte 3"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        rows_of(tmp_path, name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.json", ["a.json"]),
        ("**/a.json", ["a.json", "x/a.json", "x/y/a.json"]),
        ("*/a.json", ["x/a.json"]),
        ("x/**/a.json", ["x/a.json", "x/y/a.json"]),
        ("?.json", ["a.json"]),
        ("a*json", ["a.json"]),
        ("a.jso", []),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, found: list[str]) -> None:
    for name in ("a.json", "x/a.json", "x/y/a.json", ".hidden/a.json", "ajson.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]")
    assert matching((pattern,), tmp_path) == matching(("absent", pattern), tmp_path) == found  # the first that matches


# --- declaration files

GOOD = """
name: mine.words
licence: none
raw: {test: words.csv}
context: "Q: {{ q }}"
completion: "{{ a }}"
"""


def declared(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return load_declaration(file)


def test_the_least_that_a_declaration_needs(tmp_path: Path) -> None:
    made = declared(tmp_path, GOOD)
    assert (made.name, made.metric, made.group, made.hub, made.source) == (
        "mine.words",
        "em",
        "own",
        None,
        "local files",
    )
    assert made.templates["draw_by"] == made.templates["context"]


def test_a_declaration_may_name_a_metric_of_a_plugin(tmp_path: Path, plugins_forgotten: None) -> None:
    register_metric("length")(lambda prediction, golds: float(len(prediction)))
    assert declared(tmp_path, GOOD + "metric: length\n").metric == "length"


def test_words_that_yaml_would_turn_into_values_stay_words(tmp_path: Path) -> None:
    made = declared(tmp_path, GOOD + "fields: {a: no, b: 007, c: 2020-01-01}\ngroup: yes\nnotes: null\n")
    assert made.layout.fields == {"a": "no", "b": "007", "c": "2020-01-01"}
    assert (made.group, made.notes) == ("yes", "null")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: mine.words", "name: mine", "'name': expected a name like 'mine.questions'.*found 'mine'"),
        ("name: mine.words", "name: ../x.y", "'name': expected a name like"),
        ("licence: none\n", "", "'licence': expected this key beside name, raw, context, completion, found nothing"),
        ("licence: none", "license: none", r"expected the keys name, .* \(did you mean 'licence'\?\), found 'license'"),
        ("licence: none", "licence: [a]", "'licence': expected text, found a list"),
        ("licence: none", "licence: ' '", "'licence': expected text, found ' '"),
        ("licence: none", "licence: a\nlicence: b", "expected YAML in UTF-8, found .*licence.* occurs twice .line"),
        (
            "licence: none",
            "licence: none\nmetric: blue",
            "'metric': expected one of em, em_multi, em_first, bleu, rouge, found 'blue'",
        ),
        ("raw: {test: words.csv}\n", "", "'source': expected either 'source' .* or 'raw' .*, found nothing"),
        ("test: words.csv", "dev: words.csv", r"'raw': expected the keys test, train, found 'dev'"),
        (
            "test: words.csv",
            "train: words.csv",
            r"'raw.test': expected this key beside train, found nothing",
        ),
        ("test: words.csv", "test: /etc/passwd", "expected a path or pattern below the source's folder"),
        ("test: words.csv", "test: ../words.csv", "expected a path or pattern below the source's folder"),
        ("test: words.csv", "test: []", "expected a path or pattern below the source's folder, found nothing"),
        ('"{{ a }}"', '""', "'completion': expected text, found nothing"),
        ("raw: {test: words.csv}", "source: {repo: a/b}", "'source.test': expected the split"),
        ("raw:", "source: {repo: a/b, test: x}\nraw:", "'source': expected either 'source' .* or 'raw'"),
        ("raw:", "fields: {q: {from: x}}\nraw:", "'fields.q': expected text, found a mapping"),
        ("raw:", "fields: [a]\nraw:", "'fields': expected names and the Jinja2 expressions .*, found a list"),
        ("raw: {", "raw: [{", "mine.yaml: expected YAML in UTF-8, found .*line 5.*; fix the file"),
        ("licence: none", "licence: !!python/object/apply:os.system [echo]", "'licence': expected text, found a list"),
    ],
)
def test_a_mistake_in_a_declaration_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(DataError, match=message) as caught:
        declared(tmp_path, GOOD.replace(old, new))
    assert str(caught.value).startswith(str(tmp_path / "mine.yaml")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a", "word", "\x00", "[" * 5000])
def test_what_is_no_declaration_is_said(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"mine\.yaml"):
        declared(tmp_path, content)


def test_rows_of_one_prompt_are_one_instance_with_the_references_of_all(tmp_path: Path) -> None:
    made = declared(tmp_path, GOOD + 'references: "{{ more }}"\n')
    rows = [("1", {"q": "a", "a": "x", "more": ["y", "x"]}), ("2", {"q": "b", "a": "", "more": []})]
    rows += [("3", {"q": "a", "a": "z", "more": None})]
    found = make_instances("mine.words", Wording(made), rows)
    assert found.unusable == 1
    assert [instance.row() for instance in found.items] == [
        {"context": "Q: a", "completion": "x", "references": ["x", "y", "z"]}
    ]
    assert found.other_golds == 0


def test_without_references_the_first_gold_text_stays_and_others_are_counted(tmp_path: Path) -> None:
    made = declared(tmp_path, GOOD)
    rows = [(str(number), {"q": q, "a": a}) for number, (q, a) in enumerate([("a", "x"), ("a", "x"), ("a", "y")])]
    found = make_instances("mine.words", Wording(made), rows)
    assert [instance.row() for instance in found.items] == [{"context": "Q: a", "completion": "x"}]
    assert (found.unusable, found.other_golds) == (0, 1)


def test_text_that_no_tokenizer_accepts_is_left_out(tmp_path: Path) -> None:
    made = declared(tmp_path, GOOD)
    rows = [("1", {"q": "\ud800", "a": "x"}), ("2", {"q": "b", "a": "y"})]
    found = make_instances("mine.words", Wording(made), rows)
    assert (len(found.items), found.unusable) == (1, 1)
    with pytest.raises(DataError, match="none of 1 rows has a prompt and a gold text; is this the right split"):
        make_instances("mine.words", Wording(made), rows[:1])
    with pytest.raises(DataError, match=r"dataset 'mine\.words': expected rows, found none in its files"):
        make_instances("mine.words", Wording(made), [])


def test_names_patterns_and_first_parts_are_chosen() -> None:
    known = list(packaged())
    assert chosen([], known) == known
    assert chosen(["anli"], known) == chosen(["anli.*"], known) == ["anli.r1", "anli.r2", "anli.r3"]
    assert chosen(["tqa.rc, nq", "tqa.*"], known) == ["tqa.rc", "nq.natural-questions"]
    with pytest.raises(UsageError, match=r"'anli.r4': not declared \(did you mean 'anli.r[123]'\?\)"):
        chosen(["anli.r4"], known)


@pytest.mark.parametrize("template", ["{{ [1, 2] | random }}", "{{ lipsum() }}", "{{ row | xmlattr | nosuch }}"])
def test_the_same_row_gives_the_same_texts(template: str) -> None:
    with pytest.raises((DataError, RowError)):
        Wording(declaration(template)).of({"a": 1})
