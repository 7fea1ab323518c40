"""Tiny Parquet files in the real schema of every source that a declaration names, all of it made up here.

`write_hub(root, name, count)` writes the files of the Hub's repository below `root/org/name`. Row `i` of a source is
about the number `i`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from logo.evaluation.sources.declarations import packaged


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
            made = {"uid": "u", "reason": ""}
            return [made | {"premise": f"It is {i}.", "hypothesis": f"{i}?", "label": i % 3} for i in numbers]
        case "code_x_glue":
            return [code_row(sub, i) for i in numbers]
    return [HUB[name](i) for i in numbers]


def arc(i: int) -> dict[str, Any]:
    labels = list("1234") if i % 5 == 0 else list("ABCD")
    asked = {"id": f"Q{i}", "question": f"Which is number {i}?", "answerKey": labels[i % 4]}
    return asked | {"choices": {"text": list("wxyz"), "label": labels}}


def code_row(sub: str, i: int) -> dict[str, Any]:
    if sub.startswith("code_to_text"):
        made = {"id": i, "repo": "a/b", "path": "c", "func_name": "f", "code": "f ( )", "docstring": "Do.\nMore."}
        return made | {"code_tokens": [f"tok{i}", "(", "x", ")"], "docstring_tokens": ["Returns", str(i), "."]}
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
        "gem_id": f"e{i}",
        "meaning_representation": f"name[Inn {i}], food[Fish]",
        "target": f"Inn {i} has fish.",
        "references": [f"Inn {i} has fish.", f"Fish at Inn {i}."],
    },
    "gem.web_nlg": lambda i: {
        "gem_id": f"w{i}",
        "input": [" | ".join(triple) for triple in triples(i)],
        "category": "Bridge",
        **bridge(i),
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


def write_hub(root: Path, name: str, count: int = 12) -> Path:
    """The repository's Parquet files, where its declaration says; returns its folder. Where splits are the same, there
    is one file."""
    import pyarrow
    import pyarrow.parquet

    source = packaged()[name].source
    for split, first in {source.test: 0, source.train: 1000 if source.train != source.test else 0}.items():
        converted = source.repo.startswith("GEM/")  # to Parquet, by the Hub itself
        folder = root / source.repo / (source.config if converted or source.config != "default" else "data")
        file = folder / split / "0000.parquet" if converted else folder / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(hub_rows(name, count, first)), file)
    return root / source.repo
