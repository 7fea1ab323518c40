"""Which text a document of lm-evaluation-harness is selected on, when several contexts are asked about.

A task may ask about one document under several contexts, and compare the likelihoods: Winogrande puts each of two names
into the blank and asks how likely the rest of the sentence is. Likelihoods can only be compared under one model, so a
document has one selection. It is made on what its requests have in common, so that no answer is favoured.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r"\s*\S+")


def document_texts(requests: Sequence[Any]) -> list[str]:
    """For each request the text that the adapters of its document are selected on.

    Args:
        requests: instances of the harness, each with a task's name, a number of the document, and (context,
            continuation) as arguments. One without a number is a document of its own.
    """
    documents: dict[object, list[tuple[str, str]]] = {}
    keys: list[object] = []
    for place, request in enumerate(requests):
        key: object = place if request.doc_id is None else (request.task_name, request.doc_id)
        documents.setdefault(key, []).append(request.args[:2])
        keys.append(key)
    chosen = {key: common_text(pairs) for key, pairs in documents.items()}
    return [chosen[key] for key in keys]


def common_text(pairs: Sequence[tuple[str, str]]) -> str:
    """What the requests of one document have in common, given as (context, continuation).

    The words that all contexts begin with. Contexts that are empty do not count, as a likelihood without any context
    may be asked for beside the others; where no context has text, continuations stand in for them. Where they begin
    with different words, it is the words that all requests end with, continuations included. Where these differ too,
    it is the first text, whole.
    """
    texts = [context for context, _ in pairs if context.strip()] or [continuation for _, continuation in pairs]
    if len(set(texts)) == 1:
        return texts[0]
    begin = _common([_WORD.findall(text) for text in texts])
    whole = [context + continuation for context, continuation in pairs]
    end = _common([_WORD.findall(text)[::-1] for text in whole])[::-1]
    return "".join(begin) or "".join(end).lstrip() or texts[0]


def _common(lists: Sequence[list[str]]) -> list[str]:
    """What all lists begin with."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    return [column[0] for column in alike]
