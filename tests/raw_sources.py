"""Tiny raw files in the real schema of every source that a declaration names, all of it made up here.

`write_hub(root, name, count)` writes the Parquet files of the Hub's repository below `root/org/name`;
`write_raw(root, name, count)` the files of the source's own release. Row `i` of a source is about the number `i`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LANGUAGES = {"eng": "en", "fra": "fr", "deu": "de", "ron": "ro"}
CODES = {code: three for three, code in LANGUAGES.items()}
LABELS = ("entailment", "neutral", "contradiction")

Rows = list[dict[str, Any]]


def words(i: int) -> list[str]:
    return [f"tok{i}", "(", "x", ")"]


def triples(i: int) -> list[list[str]]:
    return [[f"Bridge {i}", "length", f"{i} m"], [f"Bridge {i}", "crosses", "River, the wide one"]]


def hub_rows(name: str, count: int, first: int = 0) -> Rows:
    """Rows as the repository on the Hub has them."""
    main, _, sub = name.partition(".")
    numbers = range(first, first + count)
    match main:
        case "bbh":
            return [{"input": f"not ( {i} ) is", "target": str(i % 2 == 0)} for i in numbers]
        case "wmt14" | "wmt16":
            return [{"translation": {code: f"{code} sentence {i}." for code in sub.split("-")}} for i in numbers]
        case "ai2_arc":
            return [arc(i) | {"choices": {"text": list("wxyz"), "label": arc_labels(i)}} for i in numbers]
        case "anli":
            made = {"uid": "u", "reason": ""}
            return [made | {"premise": f"It is {i}.", "hypothesis": f"{i}?", "label": i % 3} for i in numbers]
        case "code_x_glue":
            return [code_row(sub, i) for i in numbers]
    return [HUB[name](i) for i in numbers]


def arc(i: int) -> dict[str, Any]:
    return {"id": f"Q{i}", "question": f"Which is number {i}?", "answerKey": arc_labels(i)[i % 4]}


def arc_labels(i: int) -> list[str]:
    return list("1234") if i % 5 == 0 else list("ABCD")


def code_row(sub: str, i: int) -> dict[str, Any]:
    if sub.startswith("code_to_text"):
        made = {"id": i, "repo": "a/b", "path": "c", "func_name": "f", "code": "f ( )", "docstring": "Do.\nMore."}
        return made | {"code_tokens": words(i), "docstring_tokens": ["Returns", str(i), "."]}
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
    "gem.dart": lambda i: {
        "gem_id": f"d{i}",
        "tripleset": triples(i),
        "subtree_was_extended": False,
        "target": f"It is {i} m.",
        "references": [f"It is {i} m.", f"{i} m it is."],
    },
    "gem.e2e_nlg": lambda i: {
        "gem_id": f"e{i}",
        "meaning_representation": f"name[Inn {i}], food[Fish]",
        "target": f"Inn {i} has fish.",
        "references": [f"Inn {i} has fish.", f"Fish at Inn {i}."],
    },
    "gem.web_nlg": lambda i: {
        "gem_id": f"w{i}",
        "input": [" | ".join(triple) for triple in triples(i)],
        "target": f"It is {i} m.",
        "references": [f"It is {i} m.", f"{i} m it is."],
        "category": "Bridge",
    },
    "nq.natural-questions": lambda i: {"question": f"what is number {i}", "answer": [str(i), f"number {i}"]},
    "tqa.rc": lambda i: {
        "question": f"What is number {i}?",
        "question_id": f"t{i}",
        "entity_pages": {"title": ["A"], "wiki_context": [""]},
        "answer": {"value": str(i), "aliases": [f"No {i}", str(i)], "normalized_value": str(i)},
    },
    "glue.qnli": lambda i: {"question": f"How many is {i}?", "sentence": f'He said "{i}".', "label": i % 2, "idx": i},
}

# Where the Hub keeps the splits of each declaration: repository, folder of the configuration, split names.
PLACES: dict[str, tuple[str, str, str, str]] = {
    "bbh": ("lukaemon/bbh", "{sub}", "test", "test"),
    "wmt14": ("wmt/wmt14", "fr-en", "test", "validation"),
    "wmt16": ("wmt/wmt16", "{foreign}-en", "test", "validation"),
    "ai2_arc": ("allenai/ai2_arc", "{sub}", "test", "train"),
    "anli": ("facebook/anli", "plain_text", "test_{sub}", "train_{sub}"),
    "nq": ("google-research-datasets/nq_open", "nq_open", "validation", "train"),
    "tqa": ("mandarjoshi/trivia_qa", "rc.nocontext", "validation", "train"),
    "glue": ("nyu-mll/glue", "qnli", "validation", "train"),
    "gem.common_gen": ("allenai/common_gen", "data", "validation", "train"),
    "gem.dart": ("GEM/dart", "default", "test", "validation"),
    "gem.e2e_nlg": ("GEM/e2e_nlg", "default", "test", "validation"),
    "gem.web_nlg": ("GEM/web_nlg", "en", "test", "validation"),
    "code_to_text": ("google/code_x_glue_ct_code_to_text", "{last}", "test", "validation"),
    "text_to_text": ("google/code_x_glue_tt_text_to_text", "{foreign}_en", "test", "validation"),
    "text_to_code": ("google/code_x_glue_tc_text_to_code", "data", "validation", "train"),
    "code_to_code": ("google/code_x_glue_cc_code_to_code_trans", "data", "test", "validation"),
    "code_refinement": ("google/code_x_glue_cc_code_refinement", "small", "test", "validation"),
}


def place(name: str) -> tuple[str, str, str, str]:
    main, _, sub = name.partition(".")
    key = next(key for key in (name, sub.rpartition("_")[0], main) if key in PLACES)
    last = sub.rpartition("_")[2]
    foreign = next((part for part in last.split("-") if part != "en"), "")
    repo, *rest = (part.format(sub=sub, last=last, foreign=foreign) for part in PLACES[key])
    config, test, train = rest
    return repo, config, test, train


def write_hub(root: Path, name: str, count: int = 12) -> Path:
    """The repository's Parquet files; returns its folder. Where splits are the same, there is one file."""
    import pyarrow
    import pyarrow.parquet

    repo, config, test, train = place(name)
    for split, first in {test: 0, train: 1000 if train != test else 0}.items():
        folder, converted = root / repo / config, repo.startswith("GEM/")
        file = folder / split / "0000.parquet" if converted else folder / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(hub_rows(name, count, first)), file)
    return root / repo


def write_raw(root: Path, name: str, count: int = 12) -> None:
    """The files of the source's own release."""
    for file, content in raw_files(name, count):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content, encoding="utf-8", newline="")


def raw_files(name: str, count: int) -> Iterator[tuple[str, str]]:
    main, _, sub = name.partition(".")
    both = (("test", range(count)), ("train", range(1000, 1000 + count)))
    match main:
        case "bbh":
            yield f"bbh/{sub}.json", json.dumps({"canary": "none", "examples": hub_rows(name, count)})
            return
        case "wmt14" | "wmt16":
            pair = "-".join(CODES[code] for code in sub.split("-"))
            for code in sub.split("-"):
                file = f"testsets/{pair}/newstest20{main[3:]}.{CODES[code]}"
                yield file, "".join(f"{code} sentence {i}.\n" for i in range(count))
            return
        case "code_x_glue":
            yield from code_files(sub, count)
            return
    for split, numbers in both:
        yield from RAW.get(name, RAW.get(main))(name, split, numbers)  # type: ignore[misc]


def jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def code_files(sub: str, count: int) -> Iterator[tuple[str, str]]:
    kind, last = sub.rpartition("_")[0], sub.rpartition("_")[2]
    for split, first in (("test", 0), ("valid", 1000)):
        rows = [code_row(sub, i) for i in range(first, first + count)]
        columns = {key: "".join(str(row[key]) for row in rows) for key in rows[0] if key not in ("id", "code")}
        if kind == "code_to_text":
            yield f"dataset/{last}/{split}.jsonl", jsonl(rows)
        elif kind == "text_to_text":
            where = "test" if split == "test" else "dev"
            for column, code in (("source", last[:2]), ("target", "en")):
                yield f"data/{where}/{last}.{where}.{code}", columns[column]
        elif kind == "text_to_code":
            yield f"dataset/concode/{'dev' if split == 'test' else 'train'}.json", jsonl(rows)
        else:
            stem = f"data/{split}.java-cs.txt" if kind == "code_to_code" else f"data/small/{split}.buggy-fixed"
            yield from ((f"{stem}.{column}", text) for column, text in columns.items())


def common_gen_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    rows = [{"concept_set": f"dog#tree{i}", "scene": [f"A dog, {i}.", f"{i} dogs."], "reason": []} for i in numbers]
    yield f"commongen.{'dev' if split == 'test' else 'train'}.jsonl", jsonl(rows)


def dart_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    notes = [{"source": "made", "text": "It is long."}, {"source": "made", "text": "Long it is."}]
    rows = [{"tripleset": triples(i), "subtree_was_extended": True, "annotations": notes} for i in numbers]
    yield f"data/v1.1.1/dart-v1.1.1-full-{'test' if split == 'test' else 'dev'}.json", json.dumps(rows)


def e2e_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    file = Path("test-fixed.csv" if split == "test" else "devel-fixed.no-ol.csv")
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["mr", "ref"])
    for i in numbers:  # two lines for each meaning
        writer.writerows([f"name[Inn {i}], food[Fish]", text] for text in (f'Inn {i} has "fish".', f"Fish at {i}."))
    yield f"cleaned-data/{file}", table.getvalue()


def web_nlg_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    entries = "".join(
        f'<entry category="Bridge" eid="Id{i}"><originaltripleset><otriple>x</otriple></originaltripleset>'
        + "<modifiedtripleset>"
        + "".join(f"<mtriple>{triple}</mtriple>" for triple in map(" | ".join, triples(i)))
        + "</modifiedtripleset>"
        + f'<lex comment="good" lid="Id1">It is {i} m.</lex><lex comment="good" lid="Id2">{i} &lt; more.</lex></entry>'
        for i in numbers
    )
    test = "rdf-to-text-generation-test-data-with-refs-en.xml"
    file = f"test/{test}" if split == "test" else "dev/2triples/Bridge.xml"
    yield f"release_v3.0/en/{file}", f'<?xml version="1.0" ?><benchmark><entries>{entries}</entries></benchmark>'


def arc_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    sub = name.partition(".")[2]
    rows = []
    for i in numbers:
        choices = [{"text": text, "label": label} for text, label in zip("wxyz", arc_labels(i), strict=True)]
        rows.append(arc(i) | {"question": {"stem": f"Which is number {i}?", "choices": choices}})
    yield f"ARC-V1-Feb2018-2/{sub}/{sub}-{split.capitalize()}.jsonl", jsonl(rows)


def nq_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    rows = [HUB[name](i) for i in numbers]
    yield f"nq_open/NQ-open.{'dev' if split == 'test' else 'train'}.jsonl", jsonl(rows)


def tqa_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    rows = [{"Question": f"What is {i}?", "Answer": {"Value": str(i), "Aliases": [f"No {i}"]}} for i in numbers]
    file = f"qa/wikipedia-{'dev' if split == 'test' else 'train'}.json"
    yield file, json.dumps({"Data": rows, "Domain": "Wikipedia", "Version": 1.0}, indent=1)


def anli_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    folder = name.partition(".")[2].upper()
    rows = [{"uid": "u", "context": f"It is {i}.", "hypothesis": f"{i}?", "label": "enc"[i % 3]} for i in numbers]
    yield f"anli_v1.0/{folder}/{split}.jsonl", jsonl(rows)


def qnli_raw(name: str, split: str, numbers: range) -> Iterator[tuple[str, str]]:
    lines = ["index\tquestion\tsentence\tlabel\n"]
    lines += [f'{i}\tHow many is "{i}?\tHe said {i}.\t{("not_" * (i % 2))}entailment\n' for i in numbers]
    yield f"QNLI/{'dev' if split == 'test' else 'train'}.tsv", "".join(lines)


RAW: dict[str, Callable[[str, str, range], Iterator[tuple[str, str]]]] = {
    "gem.common_gen": common_gen_raw,
    "gem.dart": dart_raw,
    "gem.e2e_nlg": e2e_raw,
    "gem.web_nlg": web_nlg_raw,
    "ai2_arc": arc_raw,
    "nq": nq_raw,
    "tqa": tqa_raw,
    "anli": anli_raw,
    "glue": qnli_raw,
}
