"""The text by which adapters are selected for a document of lm-evaluation-harness, which may have several contexts.

A task may ask about one document under several contexts and compare the likelihoods: Winogrande puts each of two names
into the blank and asks for the likelihood of the rest of the sentence. Likelihoods can be compared only under the same
mixture, so a document has one selection. It uses the text that the document's requests have in common, so that no
answer is favoured.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r"\s*\S+")


def document_texts(requests: Sequence[Any]) -> list[str]:
    """For each request the text that selects for its document.

    Args:
        requests: instances of the harness, each with a task's name, the number of a document, and (context,
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
    """The common text of the requests of one document, given as (context, continuation).

    It is the words with which all contexts begin. Empty contexts are ignored, because a likelihood without context may
    be requested too; if no context has text, the continuations are used. If the texts begin with different words, it is
    the words with which all requests end, continuations included, and if these differ too, the first text.
    """
    texts = [context for context, _ in pairs if context.strip()] or [continuation for _, continuation in pairs]
    if len(set(texts)) == 1:
        return texts[0]
    begin = _common([_WORD.findall(text) for text in texts])
    whole = [context + continuation for context, continuation in pairs]
    end = _common([_WORD.findall(text)[::-1] for text in whole])[::-1]
    return "".join(begin) or "".join(end).lstrip() or texts[0]


def _common(lists: Sequence[list[str]]) -> list[str]:
    """The common beginning of all lists."""
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    return [column[0] for column in alike]
