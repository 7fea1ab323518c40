"""Corpus measures of a whole dataset, which other work reports, beside the official numbers.

The kind of the dataset decides: corpus BLEU and chrF (sacrebleu), mean ROUGE of the best reference (rouge_score), or
exact match and token F1 by the rules of SQuAD v1.1. All gold texts of an instance count as references.

Every measure is a function of sums over instances. One bootstrap therefore serves all measures: it draws instances and
adds up their statistics, without reading texts again. sacrebleu computes the values and counts the statistics. Values
are fractions of one; BLEU and chrF are 0 to 100, as in that library. sacrebleu, rouge_score and nltk are imported at
the first use.
"""

from __future__ import annotations

import itertools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logo.evaluation.intervals import Interval, Values, bootstrap, of_mean, proportion
from logo.evaluation.metrics import KINDS, Kind, metric_kind, rouge

CHRF_ORDER = 6  # longest character n-gram
CHRF_BETA = 2  # recall counts twice as much as precision

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BY_CHARACTER = {"CJK": "zh", "HIRAGANA": "char", "KATAKANA": "char", "THAI": "char", "LAO": "char", "KHMER": "char"}


@dataclass(frozen=True)
class Corpus:
    """A measure of many answers together.

    Attributes:
        rows: (instances, parts), the statistics of each instance.
        worth: sums (..., parts) -> values (...).
        value: of all instances together.
        signature: how sacrebleu computed it; '' for other libraries.
    """

    rows: Values
    worth: Callable[[Values], Values]
    value: float
    signature: str = ""

    @property
    def right_or_wrong(self) -> bool:
        """Whether it is a mean of instances that are worth 0 or 1 each."""
        return self.worth is mean_worth and bool(np.isin(self.rows[:, 0], (0.0, 1.0)).all())

    def interval(self, *, seed: Sequence[int] = (0,)) -> Interval | None:
        """Its 95 % interval: Wilson's where instances are right or wrong, else a bootstrap's; None if that has none.

        Args:
            seed: of the draws.
        """
        if self.right_or_wrong:
            return proportion(int(self.rows[:, 0].sum()), len(self.rows))
        return bootstrap(self.rows, self.worth, seed=seed)


@dataclass(frozen=True)
class Extra:
    """The measures of one dataset by name: `values`, their 95 % `intervals` as far as they have one, and sacrebleu's
    `signatures`."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)


def extra_metrics(
    dataset: str,
    predictions: Sequence[str],
    golds: Sequence[Sequence[str]],
    *,
    metric: Kind | None = None,
    seed: int = 0,
) -> Extra:
    """The measures beside the official one, with their intervals.

    Translation and code: `bleu`, `chrf`. Text from data: `rouge-1`, `rouge-2`, `rouge-L`, `bleu`, `chrf`. Questions:
    `exact_match`, `f1`.

    Args:
        dataset: its name.
        predictions: one answer per instance; '' is a wrong one.
        golds: all gold texts of each instance, at least one.
        metric: the dataset's metric, which decides the measures; None: by the dataset's name.
        seed: of the intervals that are drawn.

    Raises:
        ValueError: no instances, unequal numbers of predictions and golds, or an instance without a gold text.
    """
    found = corpora(dataset, predictions, golds, metric=metric)
    intervals = {name: corpus.interval(seed=[seed]) for name, corpus in found.items()}
    return Extra(
        {name: corpus.value for name, corpus in found.items()},
        {name: interval for name, interval in intervals.items() if interval is not None},
        {name: corpus.signature for name, corpus in found.items() if corpus.signature},
    )


def corpora(
    dataset: str, predictions: Sequence[str], golds: Sequence[Sequence[str]], *, metric: Kind | None = None
) -> dict[str, Corpus]:
    """The measures of `extra_metrics` with the statistics of each instance, for callers that draw instances themselves.

    Raises:
        ValueError: as in `extra_metrics`.
    """
    if not predictions or len(predictions) != len(golds) or not all(golds):
        raise ValueError(
            f"dataset {dataset!r}: expected one or more predictions with at least one gold text each, "
            f"found {len(predictions)} predictions and {sum(1 for texts in golds if texts)} with gold texts"
        )
    kind = metric or metric_kind(dataset)
    if kind not in KINDS:  # a plugin's metric: no further measures are known for its answers
        return {}
    if kind.startswith("em"):
        pairs = list(zip(predictions, golds, strict=True))
        return {
            "exact_match": mean_of([max(float(same(answer, gold)) for gold in texts) for answer, texts in pairs]),
            "f1": mean_of([max(token_f1(answer, gold) for gold in texts) for answer, texts in pairs]),
        }
    found: dict[str, Corpus] = {}
    if kind == "rouge":
        scores = [[rouge(answer, gold) for gold in texts] for answer, texts in zip(predictions, golds, strict=True)]
        found = {key: mean_of([max(score[key] for score in each) for each in scores]) for key in scores[0][0]}
    from sacrebleu import BLEU, CHRF

    # `force` turns off the warning about texts that look tokenized.
    bleu, chrf = BLEU(tokenize=tokenizer_for(golds), force=True), CHRF(char_order=CHRF_ORDER, beta=CHRF_BETA)
    found["bleu"] = _by_sacrebleu(bleu, bleu_worth, predictions, golds)
    found["chrf"] = _by_sacrebleu(chrf, chrf_worth, predictions, golds)
    return found


def mean_of(values: Sequence[float] | Values) -> Corpus:
    """The measure that is the mean of one number per instance."""
    rows = np.array(values, dtype=np.float64)
    return Corpus(np.stack([rows, np.ones_like(rows)], axis=1), mean_worth, float(rows.mean()))


def mean_over(datasets: Sequence[Corpus], *, seed: int = 0) -> tuple[float, Interval | None]:
    """The mean of one or more datasets' values, and its 95 % interval if it has one.

    Args:
        seed: of intervals that are drawn.
    """
    values = [dataset.value for dataset in datasets]
    return float(np.mean(values)), of_mean(values, [dataset.interval(seed=[seed]) for dataset in datasets])


def mean_worth(sums: Values) -> Values:
    """Means (...) of sums (..., 2): of the numbers, and how many there are."""
    return np.asarray(sums[..., 0] / sums[..., 1])


# -- questions: the rules of SQuAD v1.1 -----------------------------------------------------------------------------


def same(prediction: str, gold: str) -> bool:
    """Whether two answers are equal after `normalised`."""
    return normalised(prediction) == normalised(gold)


def token_f1(prediction: str, gold: str) -> float:
    """The harmonic mean of precision and recall of the answer's words after `normalised`, in [0, 1]."""
    answer, right = normalised(prediction).split(), normalised(gold).split()
    if not answer or not right:
        return float(answer == right)
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right))


def normalised(text: str) -> str:
    """The text in lower case, without ASCII punctuation, without `a`, `an` and `the`, and with single blanks.

    Articles stay where nothing else is left, so that the choice "(A)" is not the same as no answer; SQuAD has no such
    answers, and its own script would call them equal.
    """
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split() or plain.split())


# -- texts: BLEU and chrF -------------------------------------------------------------------------------------------


def tokenizer_for(golds: Sequence[Sequence[str]]) -> str:
    """sacrebleu's tokenizer for these gold texts: `13a`, `zh` for Chinese, `char` for other scripts without spaces.

    It is decided by the letters of all texts together, so it depends neither on the dataset's name nor on the answers.
    """
    scripts: Counter[str] = Counter()
    for text in (text for texts in golds for text in texts):
        for letter in filter(str.isalpha, text):
            script = "" if letter < "\u0e00" else unicodedata.name(letter, "").partition(" ")[0]
            scripts[_BY_CHARACTER.get(script, "13a")] += 1
    if 2 * scripts["13a"] >= scripts.total():
        return "13a"
    # Japanese mixes Chinese characters and kana, so kana decide.
    return "char" if 10 * scripts["char"] > scripts["zh"] else "zh"


def _by_sacrebleu(
    metric: Any, worth: Callable[[Values], Values], predictions: Sequence[str], golds: Sequence[Sequence[str]]
) -> Corpus:
    """A measure of sacrebleu, with the statistics of each instance that its own significance tests use. They are
    private there; our tests check that `worth` of their sums is the library's value."""
    # All first gold texts, all second ones, ...; None where an instance has no more.
    texts, streams = list(predictions), [list(column) for column in itertools.zip_longest(*golds)]
    value = metric.corpus_score(texts, streams).score
    rows = np.array(metric._extract_corpus_statistics(texts, streams), dtype=np.float64)
    return Corpus(rows, worth, float(value), str(metric.get_signature()))


def bleu_worth(sums: Values) -> Values:
    """BLEU-4 with exponential smoothing, 0 to 100 (...), of sums (..., 10): the answers' and the references' length,
    and for each order the n-grams that match and all of the answers'."""
    length, wanted = sums[..., 0], sums[..., 1]
    right, total = sums[..., 2:6], sums[..., 6:10]
    missed = right == 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        precision = np.where(missed, 1 / 2.0 ** np.cumsum(missed, axis=-1), right) / total
        brevity = np.exp(np.minimum(0, 1 - wanted / length))
        score = 100 * brevity * np.exp(np.log(precision).mean(axis=-1))
    return np.asarray(np.where(missed.all(axis=-1) | (total == 0).any(axis=-1), 0.0, score))


def chrf_worth(sums: Values) -> Values:
    """chrF2, 0 to 100 (...), of sums (..., 18): for each order the answers' character n-grams, the gold texts', and
    those in both."""
    ours, theirs, both = (sums[..., start::3] for start in range(3))
    counts = (ours > 0) & (theirs > 0)
    orders = np.maximum(counts.sum(axis=-1), 1)
    precision = (both / np.where(counts, ours, np.inf)).sum(axis=-1) / orders
    recall = (both / np.where(counts, theirs, np.inf)).sum(axis=-1) / orders
    weight = CHRF_BETA**2
    apart = weight * precision + recall
    return np.asarray(100 * ((1 + weight) * precision * recall / np.where(apart > 0, apart, 1.0)))
