"""The score of a prediction: the official metrics, one number (or three) per instance.

Exact match: strip, lower, drop every ".", compare. BLEU: nltk's sentence BLEU-4 with uniform weights, smoothing method
1, tokens at white space, one reference. ROUGE: rouge_score with its stemmer, F-measure. A dataset's metric is the one
that the run was given, else the one declared beside its rows, else that of its name's first part. `run.json` records
it. Values are fractions of one; only `summary_line` uses percent.
nltk and rouge_score are imported at the first use, or by `load`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, Protocol, SupportsFloat, TypeVar

from logo.errors import LoGoError, PluginError, UsageError, check_choice, closest
from logo.plugins import Registry

Kind = str  # a name of `METRICS`
Value = int | float | dict[str, float]
Scale = Literal["binary", "graded"]  # each value is 0 or 1, or may be anything between them


class MetricFunction(Protocol):
    """A metric: a function without state that scores one answer."""

    def __call__(self, prediction: str, golds: Sequence[str], /) -> float:
        """A number from 0 (worthless) to 1 (perfect); results are means of it, shown in percent.

        Args:
            prediction: the first line of the answer, stripped.
            golds: the gold texts of the row, one or more.

        Raises:
            LoGoError: an error that the user can fix; any other exception is a bug of the metric, and the error
                names it.
        """


_F = TypeVar("_F", bound=MetricFunction)


@dataclass(frozen=True)
class Metric:
    """A registered metric: the function that gives an answer's value, and the scale of such values."""

    function: Callable[[str, Sequence[str]], Value]
    scale: Scale


METRICS: Registry[Metric] = Registry("metric")

_BY_NAME: Mapping[str, Kind] = {
    "bbh": "em",
    "wmt14": "bleu",
    "wmt16": "bleu",
    "gem": "rouge",
    "ai2_arc": "em",
    "nq": "em_multi",
    "tqa": "em_multi",
    "anli": "em",
    "glue": "em",
    "code_x_glue": "bleu",
}
# What the official script computes where its table of metrics says something else. Of several gold texts it sees only
# the first: the loader of its rows turns the list of a row into as many lists of one text, and the row's one answer is
# compared with the first of them.
OFFICIAL_KINDS: Mapping[Kind, Kind] = {"em_multi": "em_first"}
_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-L": "rougeL"}  # our key: rouge_score's
LABELS = {
    "em": "Accuracy",
    "em_first": "Accuracy",
    "bleu": "BLEU",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-L": "ROUGE-L",
}


def metric_kind(dataset: str) -> Kind:
    """The metric of a dataset without a declared one, by the part of its name before the first dot or slash; exact
    match for unknown names.
    """
    return _BY_NAME.get(re.split(r"[./]", dataset, maxsplit=1)[0], "em")


def checked_kind(text: object, where: str) -> Kind:
    """The metric of this name.

    Raises:
        UsageError: there is none; `where` says where the name was found.
    """
    kind = str(text)
    try:
        _ = METRICS[kind]
    except UsageError:
        names = tuple(METRICS)
        raise UsageError(
            f"{where}: expected a metric ({', '.join(names)}), found {text!r}{closest(kind, names)}; a metric of your "
            "own needs --plugin"
        ) from None
    return kind


def answer_in(text: str, whole: bool = False, front: str = "", end: str = "", *, official: bool = False) -> str:
    """The answer in a decoded continuation: stripped, and unless it is judged whole, its first line (`str.splitlines`).
    What the chat template writes in front of answers and behind them (`logo.prompts.around_answer`) is no part of it.

    Args:
        official: blanks at the end of the first line stay when more lines follow, as in the official code.
    """
    text = text.strip().removeprefix(front.strip()).strip()
    mark = end.strip()
    if not whole and text:
        first_line = text.splitlines()[0]
        text = first_line if official else first_line.rstrip()
    return text.removesuffix(mark).rstrip() if mark else text


def em(prediction: str, completion: str | Sequence[str]) -> int:
    """1 if the prediction equals the gold text after normalisation, else 0; a list of gold texts means any of them."""
    golds = (completion,) if isinstance(completion, str) else completion
    answer, *right = (text.strip().lower().replace(".", "") for text in (prediction, *golds))
    return int(answer in right)


def em_multi(prediction: str, completion: str | Sequence[str]) -> int:
    """1 if the prediction equals any of the gold texts; the official name for `em` over a list."""
    return em(prediction, completion)


def em_first(prediction: str, completion: str | Sequence[str]) -> int:
    """1 if the prediction equals the first of the gold texts: see `OFFICIAL_KINDS`."""
    return em(prediction, _first(completion))


def bleu(prediction: str, completion: str | Sequence[str]) -> float:
    """BLEU-4 of one sentence; of a list of gold texts only the first counts (the official data has a single one)."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1
    return float(sentence_bleu([_first(completion).split()], prediction.split(), smoothing_function=smoothing))


def rouge(prediction: str, completion: str | Sequence[str]) -> dict[str, float]:
    """F-measures under "rouge-1", "rouge-2", "rouge-L"; of a list of gold texts only the first counts, as in `bleu`."""
    scores = _rouge_scorer().score(_first(completion), prediction)
    return {ours: float(scores[theirs].fmeasure) for ours, theirs in _ROUGE.items()}


_OURS: Mapping[Kind, Metric] = {
    "em": Metric(em, "binary"),
    "em_multi": Metric(em_multi, "binary"),
    "em_first": Metric(em_first, "binary"),
    "bleu": Metric(bleu, "graded"),
    "rouge": Metric(rouge, "graded"),
}
KINDS = tuple(_OURS)
"""The metrics that are not a plugin's."""
for _name, _metric in _OURS.items():
    METRICS.add(_name, _metric, _metric.function)


def register_metric(name: str, *, scale: Scale = "graded") -> Callable[[_F], _F]:
    """Registers a `MetricFunction` as the metric of this name; a decorator.

    Args:
        scale: `"graded"`: a value may be any number from 0 to 1; `"binary"`: it is 0 or 1, an answer is right or wrong.
            Intervals and tests of results follow from it (`logo.evaluation.statistics`).

    Raises:
        UsageError: the name is taken, or there is no such scale.
    """
    check_choice(f"metric {name!r}: scale", scale, Scale)
    if name == "extra":
        raise UsageError("metric 'extra': results have something else under this name; choose another one")

    def add(function: _F) -> _F:
        METRICS.add(name, Metric(function, scale), function)
        return function

    return add


def scale_of(kind: Kind) -> Scale:
    """The scale of a metric's values; `"graded"`, which assumes least, for a plugin's that is not loaded."""
    metric = METRICS.get(kind)
    return "graded" if metric is None else metric.scale


def measure(kind: Kind, prediction: str, completion: str | Sequence[str]) -> Value:
    """The score of one prediction under a metric: 0 or 1, a BLEU in [0, 1], the three ROUGE F-measures, or a plugin's
    number.

    Raises:
        PluginError: a plugin fails, or does not return a number of its scale.
    """
    golds = (completion,) if isinstance(completion, str) else completion
    metric = METRICS[kind]  # a plugin is loaded, and known as one, when it is first used
    if kind not in METRICS.definitions:
        return metric.function(prediction, golds)
    try:
        value: object = metric.function(prediction, golds)
    except LoGoError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        where = f"for the answer {prediction!r:.60} and the gold texts {list(golds)!r:.60}"
        raise PluginError(f"metric {kind!r} failed {where} ({reason}); --debug shows the traceback") from error
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan  # of NumPy and torch, too
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several numbers
        number = math.nan
    if not 0 <= number <= 1:
        raise PluginError(f"metric {kind!r}: expected a number from 0 to 1, found {value!r:.60}")
    if metric.scale == "binary" and number not in (0, 1):
        raise PluginError(f"metric {kind!r}: expected 0 or 1, since its scale is 'binary', found {value!r:.60}")
    return number


def zero(kind: Kind) -> Value:
    """The value of a row without an answer; an empty answer could be right."""
    return dict.fromkeys(measures(kind), 0.0) if kind == "rouge" else 0


def judge(kind: Kind, prediction: str, completion: str | Sequence[str], *, failed: bool) -> Value:
    """The value of a stored answer; raises as `measure`."""
    return zero(kind) if failed else measure(kind, prediction, completion)


def load(kind: Kind) -> None:
    """Imports whatever a metric needs, so that its first value takes no longer than the others.

    Raises:
        UsageError: there is no such metric.
        PluginError: it is a plugin's, which cannot be imported.
    """
    METRICS[kind]  # loads a plugin
    if kind in KINDS:
        measure(kind, "", "")


def measures(kind: Kind) -> tuple[str, ...]:
    """The names of the numbers that a metric gives each answer: `em` (also of `em_multi`, which is the same function),
    `em_first`, `bleu`, a plugin's name, or the three of ROUGE; the primary one comes last."""
    if kind == "rouge":
        return tuple(_ROUGE)
    return ("em" if kind == "em_multi" else kind,)


def group_measure(measure: str) -> str:
    """The measure as which a mean over datasets counts it: `em_first` is what the official code means by exact match,
    so that its groups of datasets are those of the paper."""
    return "em" if measure == "em_first" else measure


def by_measure(kind: Kind, values: Sequence[Value]) -> dict[str, list[float]]:
    """The numbers of each measure, the primary one last, one number for each value of this metric."""
    of_metric = [value for value in values if isinstance(value, dict) == (kind == "rouge")]
    return {
        name: [float(value[name] if isinstance(value, dict) else value) for value in of_metric]
        for name in measures(kind)
    }


def summary_line(kind: Kind, values: Sequence[Value]) -> str:
    """The line a run prints, in percent: `Accuracy: 71.33`, `BLEU: 12.34`, `ROUGE-1: 45.10  ROUGE-2: ..  ROUGE-L: ..`.

    Raises:
        ValueError: no values of this metric.
    """
    means = {name: 100 * fmean(column) for name, column in by_measure(kind, values).items()}
    return "  ".join(f"{LABELS.get(name, name)}: {mean:.2f}" for name, mean in means.items())


def _first(completion: str | Sequence[str]) -> str:
    return completion if isinstance(completion, str) else completion[0]


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE.values()), use_stemmer=True)


# -- measures of whole datasets, which other work reports beside the official ones -------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SCRIPTS = {"CJK": "zh", "HIRAGANA": "char", "KATAKANA": "char", "THAI": "char", "LAO": "char", "KHMER": "char"}


def extra(kind: Kind, predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Exact match and token F1 by the rules of SQuAD v1.1 (0 to 1), for answers; or corpus BLEU and chrF (0 to 100)
    with their signatures (sacrebleu), and for texts from data ROUGE of the best gold text. Empty for a plugin's metric.

    Args:
        predictions: one answer per row; '' is a wrong one.
        golds: all gold texts of each row, which count as references.
    """
    if kind not in KINDS:
        return {}
    pairs = list(zip(predictions, golds, strict=True))
    if kind.startswith("em"):
        return _of_answers(pairs)
    best = _best_rouge(pairs) if kind == "rouge" else {}
    return {**best, **_of_corpus(predictions, golds)}


def _of_answers(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """Mean exact match and token F1 of answers, each with the gold text that it is most like."""
    exact = [max(float(squad(answer) == squad(gold)) for gold in golds) for answer, golds in pairs]
    overlap = [max(token_f1(answer, gold) for gold in golds) for answer, golds in pairs]
    return {"exact_match": fmean(exact), "f1": fmean(overlap)}


def _best_rouge(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """The mean of each ROUGE measure, of every answer with the gold text that gives most."""
    scores_of_rows = [[rouge(answer, gold) for gold in golds] for answer, golds in pairs]
    return {name: fmean(max(scores[name] for scores in row) for row in scores_of_rows) for name in _ROUGE}


def _of_corpus(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Corpus BLEU and chrF of sacrebleu, from 0 to 100, with their signatures."""
    from sacrebleu import BLEU, CHRF

    streams = [list(column) for column in itertools.zip_longest(*golds)]  # all first gold texts, all second ones, ...
    # `force` turns off the warning about texts that look tokenized.
    metrics = {"bleu": BLEU(tokenize=tokenizer_for(golds), force=True), "chrf": CHRF()}
    numbers: dict[str, Any] = {}
    for name, metric in metrics.items():
        numbers[name] = float(metric.corpus_score(list(predictions), streams).score)
        numbers[f"{name}_signature"] = str(metric.get_signature())
    return numbers


def token_f1(prediction: str, gold: str) -> float:
    """The harmonic mean of precision and recall of the answer's words after `squad`, in [0, 1]."""
    words = squad(prediction).split()
    gold_words = squad(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    common = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * common / (len(words) + len(gold_words))


def squad(text: str) -> str:
    """The text in lower case, without ASCII punctuation, without `a`, `an` and `the`, and with single blanks. Articles
    and punctuation stay where nothing else is left, so that the choices "(A)" and "?" are not the same as no answer."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split() or plain.split() or text.split())


def tokenizer_for(golds: Sequence[Sequence[str]]) -> str:
    """sacrebleu's tokenizer for these gold texts, by the letters of all together: `13a`, `zh` for Chinese, `char` for
    other scripts without spaces."""
    scripts: Counter[str] = Counter()
    for letter in filter(str.isalpha, (letter for texts in golds for text in texts for letter in text)):
        script = "" if letter < "\u0e00" else unicodedata.name(letter, "").partition(" ")[0]
        scripts[_SCRIPTS.get(script, "13a")] += 1
    if 2 * scripts["13a"] >= scripts.total():
        return "13a"
    return "char" if 10 * scripts["char"] > scripts["zh"] else "zh"  # Japanese mixes Chinese characters and kana
