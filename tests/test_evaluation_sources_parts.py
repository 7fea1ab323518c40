"""Templates, fields, readers and declaration files, most of it about input that is not as it should be."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logo.errors import DataError, UsageError
from logo.evaluation.sources.declarations import Files, Layout
from logo.evaluation.sources.fields import Field, look_up
from logo.evaluation.sources.instances import make_instances
from logo.evaluation.sources.loading import chosen, load_declaration, packaged
from logo.evaluation.sources.readers import files_below, matching, read_raw
from logo.evaluation.sources.templates import RowError, Template

NAME = st.sampled_from(["a", "B", "_c", "d1", "_", "7", "long_name", "class"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1, max_size=12)

# --- templates


@given(literals=st.lists(TEXT, min_size=1, max_size=4), values=st.dictionaries(NAME, TEXT, min_size=3, max_size=3))
def test_a_template_is_its_text_with_values_in_place_of_fields(literals: list[str], values: dict[str, str]) -> None:
    names = list(values)[: len(literals) - 1]
    escaped = [literal.replace("{", "{{").replace("}", "}}") for literal in literals]
    text = escaped[0] + "".join(f"{{{name}}}{after}" for name, after in zip(names, escaped[1:], strict=False))
    expected = literals[0] + "".join(values[n].strip() + after for n, after in zip(names, literals[1:], strict=False))
    template = Template.parse(text)
    assert template.render(values) == expected
    assert template.fields == tuple(names)
    assert template.sole == (names[0] if literals[:2] == ["", ""] and len(names) == 1 else None)


@given(TEXT.filter(lambda inner: not inner.replace("_", "a").isalnum() and "{" not in inner and "}" not in inner))
def test_a_field_is_a_plain_name_or_refused(inner: str) -> None:
    with pytest.raises(ValueError, match=r"write \{\{ and \}\} for braces that stay"):
        Template.parse(f"a {{{inner}}} b")


@pytest.mark.parametrize(
    "text",
    ["{row.__class__}", "{row[0]}", "{row!r}", "{row:>20}", "{}", "{row:{width}}", "{0.real}", "{ row }", "{", "a } b"],
)
def test_what_could_reach_into_objects_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write \{\{ and \}\}"):
        Template.parse(text)


def test_values_that_are_no_text_are_named() -> None:
    template = Template.parse("{a}")
    assert [template.render({"a": value}) for value in (3, 2.5, True, None, " x ")] == ["3", "2.5", "True", "", "x"]
    for value in ([1], {"b": 1}):
        with pytest.raises(RowError, match=r"'a' is an? (list|object); say how it becomes text"):
            template.render({"a": value})


# --- fields

ROW: dict[str, Any] = {
    "q": "What?",
    "n": 2,
    "none": None,
    "answer": {"value": "a", "aliases": ["b", "a"]},
    "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}],
    "set": "dog#tree#run",
    "triples": [["s", "r", "o"], ["t", "r", "p"]],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Field((("q",),)), "What?"),
        (Field((("answer", "aliases", "1"),)), "a"),
        (Field((("choices", "*", "text"),)), ["x", "y"]),
        (Field((("answer", "value"), ("answer", "aliases"))), ["a", "b", "a"]),
        (Field((("none", "deeper"),)), None),
        (Field((("none",),), each=Template.parse("{item}"), join=","), ""),
        (Field((("set",),), split="#", join=", "), "dog, tree, run"),
        (Field((("set",),), split="#", pick=1), "tree"),
        (Field((("choices", "1", "label"),), position_in=("choices", "*", "label")), "B"),
        (Field((("n",),), map={"2": "two"}), "two"),
        (Field((("answer", "aliases"),), map={"a": "A", "b": "B"}), ["B", "A"]),
        (Field((("triples",),), each=Template.parse("{0}-{2}"), join="; "), "s-o; t-p"),
        (Field((("choices",),), each=Template.parse("{number}{letter} {text}"), join=" "), "1A x 2B y"),
        (Field((("set",),), split="#", each=Template.parse("({letter}) {item}"), join=""), "(A) dog(B) tree(C) run"),
    ],
)
def test_fields_find_and_shape_values(field: Field, value: Any) -> None:
    assert field.value(ROW) == value


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (Field((("quest",),)), "the row has no 'quest', only 'q', 'n', 'none', 'answer'"),
        (Field((("answer", "val"),)), "'answer' has no 'val', only 'value', 'aliases'"),
        (Field((("q", "x"),)), "'q' is 'What\\?', and has no 'x'"),
        (Field((("choices", "7"),)), "'choices' is a list, and has no '7'"),
        (Field((("q", "*"),)), "'q' is 'What\\?', and 'q.\\*' needs a list there"),
        (Field((("set",),), split="#", pick=3), "'set' has 3 items, and 'pick' asks for number 3"),
        (Field((("q",),), position_in=("set",)), "'q' is 'What\\?', which 'position_in' does not find"),
        (Field((("n",),), map={"1": "a"}), "'n' is '2', which 'map' does not have; it has '1'"),
        (Field((("q",),), join=", "), "'join' needs a list"),
        (Field((("triples",),), each=Template.parse("{3}")), r"'each' names \{3\}, an item has"),
        (Field((("answer",),), map={"a": "b"}), "'answer' is an object; say how"),
    ],
)
def test_what_a_field_does_not_find_is_named(field: Field, message: str) -> None:
    with pytest.raises(RowError, match=message):
        field.value(ROW)


def test_a_path_never_reaches_attributes() -> None:
    for path in (("__class__",), ("q", "__len__"), ("choices", "0", "__dict__")):
        with pytest.raises(RowError, match="has no"):
            look_up(ROW, path)


# --- readers


def rows_of(root: Path, pattern: str, **layout: Any) -> list[Any]:
    files = {"test": Files((pattern,))}
    names = matching(files["test"], files_below(root))
    return [row for _, row in read_raw(Layout(files, {}, **layout), "test", root, names, [])]


@given(table=st.lists(st.tuples(LINE, LINE), min_size=1, max_size=5))
def test_text_formats_give_back_the_text(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    """Whatever looks like a number, a date or a missing value to other readers is text here."""
    import csv

    root = tmp_path_factory.mktemp("raw")
    rows = [{"a": a, "b": b} for a, b in table]
    (root / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "list.json").write_text(json.dumps({"data": {"rows": rows}}, indent=1))
    (root / "lines.json").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    with open(root / "x.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["a", "b"])
        writer.writeheader()
        writer.writerows(rows)
    for column in "ab":
        (root / f"x.{column}").write_text("".join(row[column] + "\n" for row in rows), encoding="utf-8", newline="")
    assert rows_of(root, "x.jsonl") == rows_of(root, "lines.json") == rows
    assert rows_of(root, "list.json", rows=("data", "rows")) == rows
    assert rows_of(root, "x.csv") == rows
    parallel = Layout({"test": Files(columns={"a": "x.a", "b": "x.b"})}, {})
    assert [row for _, row in read_raw(parallel, "test", root, ["x.a", "x.b"], [])] == rows


def test_what_other_readers_would_guess_at(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('\ufeffa,b\n007,NA\n2020-01-01,"x\ny"\n', encoding="utf-8")
    (tmp_path / "x.tsv").write_text('a\tb\n"quoted\tnull\n', encoding="utf-8")
    assert rows_of(tmp_path, "x.csv") == [{"a": "007", "b": "NA"}, {"a": "2020-01-01", "b": "x\ny"}]
    assert rows_of(tmp_path, "x.tsv") == [{"a": '"quoted', "b": "null"}]


def test_xml_elements_are_data(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text("<r><e id='1'><t>a</t><t>b &lt; c</t><n><m>d</m></n></e><f><e><t/></e></f></r>")
    assert rows_of(tmp_path, "x.xml", element="e") == [
        {"@id": "1", "t": ["a", "b < c"], "n": [{"m": ["d"]}]},
        {"t": [""]},
    ]


BOMB = '<!DOCTYPE r [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><r><e>&b;</e></r>'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "[1, 2", r"x\.json:1: invalid JSON: Expecting ',' delimiter at column 6"),
        ("x.json", '{"a": 1,\n"b": {}}', "expected a list of rows, found dict; 'rows' says where it is"),
        ("x.json", "[" * 200_000, "unreadable JSON"),
        ("x.jsonl", '{"a": 1}\n{"a"\n', r"x\.jsonl:2: invalid JSON"),
        ("x.jsonl", '{"a": 1}\n[2]\n', r"x\.jsonl: row 2: expected an object, found \[2\]"),
        ("x.csv", "a,b\n1,2\n3\n", r"x\.csv:3: expected 2 cells \(a, b\), found 1"),
        ("x.csv", 'a,b\n1,"2\n', "not a table"),
        ("x.xml", "<r><e></r>", "not XML"),
        ("x.xml", "<e>" * 5000 + "</e>" * 5000, "elements nested without end"),
        ("x.xml", BOMB, "has a document type, which may hold entities"),
        ("x.txt", "a\n", r"expected a file that ends in \.parquet, .*, found \.txt; for plain text"),
        ("x.parquet", "PAR1 no more", "cannot be read as Parquet"),
        ("x.csv", b"a\n\xff\n", r"expected UTF-8, found other bytes at byte 3"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        rows_of(tmp_path, name, element="e")
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
        ("[a].json", []),
        ("a.jso", []),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, found: list[str]) -> None:
    for name in ("a.json", "x/a.json", "x/y/a.json", ".hidden/a.json", "ajson.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]")
    names = files_below(tmp_path)
    assert matching(Files((pattern,)), names) == found
    assert matching(Files(("absent", pattern)), names) == found  # the first that matches


# --- declaration files

GOOD = """
name: mine.words
licence: none
raw: {files: {test: words.csv}}
context: "Q: {q}"
completion: "{a}"
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
    assert made.draw_by == made.context


def test_words_that_yaml_would_turn_into_values_stay_words(tmp_path: Path) -> None:
    made = declared(tmp_path, GOOD + "fields: {a: {from: label, map: {0: no, 1: yes, null: on, 2020-01-01: 007}}}\n")
    [layout] = made.layouts
    assert layout.fields["a"].map == {"0": "no", "1": "yes", "null": "on", "2020-01-01": "007"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: mine.words", "name: mine", "'name': expected a name like 'mine.questions'.*found 'mine'"),
        ("name: mine.words", "name: ../x.y", "'name': expected a name like"),
        ("licence: none\n", "", "'licence': expected this key, found only name, raw, context, completion"),
        ("licence: none", "license: none", r"'license': no such key \(did you mean 'licence'\?\)"),
        ("licence: none", "licence: [a]", "'licence': expected text, found a list"),
        ("licence: none", "licence: ' '", "'licence': expected text, found ' '"),
        ("licence: none", "licence: a\nlicence: b", "not valid YAML: the key 'licence' stands twice"),
        (
            "licence: none",
            "licence: none\nmetric: blue",
            "'metric': expected one of em, em_multi, em_first, bleu, rouge, found 'blue'",
        ),
        ("raw: {files: {test: words.csv}}\n", "", "'source': expected 'source' .*, 'raw' .* or both, found nothing"),
        ("test: words.csv", "dev: words.csv", r"'raw\[0\].files.dev': no such key.*expected test, train"),
        ("test: words.csv", "train: words.csv", r"'raw\[0\].files': expected the file 'test', found 'train'"),
        ("test: words.csv", "test: /etc/passwd", "expected a path or pattern below the source's folder"),
        ("test: words.csv", "test: ../words.csv", "expected a path or pattern below the source's folder"),
        ("test: words.csv", "test: []", "expected a path or pattern, found nothing"),
        ("{q}", "{q.a}", r"'context': \{q.a\} is not a plain field name"),
        ("{q}", "{q", "'context': expected '}' before end of string; write"),
        ('"{a}"', '""', "'completion': expected text with {fields} in it, found nothing"),
        ("raw:", "source: {repo: 'a b', test: x}\nraw:", "'source.repo': expected a repository on the Hub"),
        ("raw:", "source: {repo: a/b}\nraw:", "'source.test': expected the split"),
        ("raw:", "source: {repo: a/b, test: x, revision: ../..}\nraw:", "'source.revision': expected a branch"),
        ("raw:", "fields: {q: {path: x}}\nraw:", "'fields.q.path': no such key.*expected from, split"),
        ("raw:", "fields: {q: {from: x, pick: last}}\nraw:", "'fields.q.pick': expected the number"),
        ("raw:", "fields: {q: {from: x..y}}\nraw:", "'fields.q.from': expected a column, or a path"),
        ("raw:", "fields: {q: {from: x, map: [a]}}\nraw:", "'fields.q.map': expected pairs"),
        ("raw:", "fields: [a]\nraw:", "'fields': expected names and what they stand for, found a list"),
        ("raw: {", "raw: [{", "mine.yaml:5: not valid YAML: .*; mend the line"),
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
    made = declared(tmp_path, GOOD + 'references: "{more}"\n')
    rows = [("1", {"q": "a", "a": "x", "more": ["y", "x"]}), ("2", {"q": "b", "a": "", "more": []})]
    rows += [("3", {"q": "a", "a": "z", "more": None})]
    found = make_instances(made, made.layouts[0], rows)
    assert found.unusable == 1
    assert [instance.row() for instance in found.items] == [
        {"context": "Q: a", "completion": "x", "references": ["x", "y", "z"]}
    ]


def test_text_that_no_tokenizer_accepts_is_left_out(tmp_path: Path) -> None:
    made = declared(tmp_path, GOOD)
    rows = [("1", {"q": "\ud800", "a": "x"}), ("2", {"q": "b", "a": "y"})]
    found = make_instances(made, made.layouts[0], rows)
    assert (len(found.items), found.unusable) == (1, 1)
    with pytest.raises(DataError, match="none of 1 rows has a prompt and a gold text; is this the right split"):
        make_instances(made, made.layouts[0], rows[:1])


def test_names_patterns_and_first_parts_are_chosen() -> None:
    known = list(packaged())
    assert chosen([], known) == known
    assert chosen(["anli"], known) == chosen(["anli.*"], known) == ["anli.r1", "anli.r2", "anli.r3"]
    assert chosen(["tqa.rc, nq", "tqa.*"], known) == ["tqa.rc", "nq.natural-questions"]
    with pytest.raises(UsageError, match=r"'anli.r4': not declared \(did you mean 'anli.r[123]'\?\)"):
        chosen(["anli.r4"], known)


def test_letters_of_the_alphabet_are_enough() -> None:
    items = list(string.ascii_letters)
    with pytest.raises(RowError, match="does not find"):
        Field((("a",),), position_in=("b",)).value({"a": "z", "b": items})
