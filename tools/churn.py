"""Changes a pool while threads select, generate, stream and reselect, and checks every answer.

    python tools/churn.py --minutes 10

The bundled model's pool loses, gets and replaces one adapter again and again: the same name stands for one adapter, for
another, or for none. Eight threads ask meanwhile, by two signals. Every answer has to be that of one of the three
pools, as an engine that never changes gives it. At the end a second process reads the calibrations that were written to
disk, and its scores have to be those, too. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from logo import Adapter, AdapterPool, LoGo, PoolError, Selection
from logo.models import DEMO_FOLDER

PROMPTS = (
    "Give the word garden in all capitals.",
    "What is the plural of lake?",
    "What is 7 plus 5?",
    "Spell the word fence backwards.",
    "Hello there, who are you and what is your favourite colour of all?",
)
SIGNALS = ("calibrated", "norm")
TOKENS = 6
CHANGED = "changed"
# Scores of one batch and of another differ by rounding.
CLOSE = 1e-3

Answers = dict[tuple[str, str], tuple[dict[str, float], str]]


def pools() -> tuple[AdapterPool, list[Adapter]]:
    """The bundled pool without two of its adapters, and those two under one name."""
    bundled = AdapterPool.open(DEMO_FOLDER / "adapters")
    first, second, *unchanged = bundled
    pool = bundled.subset([adapter.name for adapter in unchanged])
    return pool, [replace(first, name=CHANGED), replace(second, name=CHANGED)]


def engine() -> LoGo:
    """An engine whose pool has none of the two."""
    from logo.models import load_base

    model, tokenizer = load_base("demo", device="cpu")
    return LoGo(model, tokenizer, pools()[0])


def facts(selection: Selection) -> dict[str, float]:
    """What is compared of a selection."""
    return dict(selection.scores)


def close(scores: dict[str, float], right: dict[str, float]) -> bool:
    """Whether scores are the same up to rounding."""
    return scores.keys() == right.keys() and all(
        abs(scores[name] - right[name]) <= CLOSE * (1 + abs(scores[name])) for name in scores
    )


def answers(logo: LoGo) -> Answers:
    """(signal, prompt) -> scores and text, of the pool as it is."""
    by_question = {}
    for signal in SIGNALS:
        for prompt in PROMPTS:
            generation = logo.generate(prompt, signal=signal, max_new_tokens=TOKENS)
            by_question[signal, prompt] = facts(generation.selection), generation.text
    return by_question


def expected(added: list[Adapter]) -> list[Answers]:
    """The answers of each of the three pools, by engines that never change."""
    of_pools = [answers(engine())]
    for adapter in added:
        logo = engine()
        logo.pool.add(adapter)
        of_pools.append(answers(logo))
    return of_pools


def asked(logo: LoGo, kind: str, signal: str, prompt: str) -> tuple[dict[str, float] | None, str | None]:
    """Scores and text of one call; None for what it does not tell."""
    if kind == "select":
        return facts(logo.select(prompt, signal=signal)), None
    if kind == "generate":
        generation = logo.generate(prompt, signal=signal, max_new_tokens=TOKENS)
        return facts(generation.selection), generation.text
    if kind == "stream":
        return None, "".join(logo.stream(prompt, signal=signal, max_new_tokens=TOKENS))
    selection = logo.select(prompt, signal=signal)
    try:
        return facts(logo.reselect(selection, k=1)), None
    except PoolError as error:
        if CHANGED in selection.scores and "those of 'changed'" in str(error):  # it was removed between the two calls
            return facts(selection), None
        raise


def is_answer(scores: dict[str, float] | None, text: str | None, right: tuple[dict[str, float], str]) -> bool:
    """Whether what a call tells is what one pool answers."""
    right_scores, right_text = right
    return (scores is None or close(scores, right_scores)) and text in (None, right_text)


def churn(logo: LoGo, right: list[Answers], threads: int, goes_on: Callable[[int], bool], seed: int = 0) -> Any:
    """Asks and changes until `goes_on(rounds of a thread)` is false. `right`: as `expected`.

    Returns:
        How often each kind of call was made and the pool was changed; and what was wrong.
    """
    _, added = pools()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    done = threading.Event()

    def ask(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        rounds = 0
        try:
            while goes_on(rounds) and not wrong:
                rounds += 1
                kind = draw.choice(("select", "generate", "stream", "reselect"))
                signal = draw.choice(SIGNALS)
                prompt = draw.choice(PROMPTS)
                scores, text = asked(logo, kind, signal, prompt)
                counts[kind] += 1
                if not any(is_answer(scores, text, of_pool[signal, prompt]) for of_pool in right):
                    wrong.append(f"{kind} by {signal} of {prompt!r}: {scores}, {text!r}")
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    def change() -> None:
        draw = random.Random(f"{seed} change")
        while not done.wait(draw.random() / 10):
            if CHANGED in logo.pool:
                logo.pool.remove(CHANGED)
            if draw.random() < 0.7:
                logo.pool.add(draw.choice(added))
            counts["changes"] += 1

    changing = threading.Thread(target=change)
    asking = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in (changing, *asking):
        thread.start()
    for thread in asking:
        thread.join()
    done.set()
    changing.join()
    return counts, wrong


def scores_of_all() -> list[dict[str, float]]:
    """The scores of all prompts by both signals and each pool, with the cache that the environment names."""
    scores = []
    for adapter in (None, *pools()[1]):
        logo = engine()
        if adapter is not None:
            logo.pool.add(adapter)
        scores += [facts(logo.select(prompt, signal=signal)) for signal in SIGNALS for prompt in PROMPTS]
    return scores


def differing(right: list[Answers], cache: str) -> tuple[int, int]:
    """How many selections another process makes with this cache, and how many of them are not `expected`."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    code = "import churn, json; print(json.dumps(churn.scores_of_all()))"
    environment = {**os.environ, "LOGO_CACHE": cache, "PYTHONPATH": path}
    process = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    read = json.loads(process.stdout.splitlines()[-1])
    right_scores = [scores for of_pool in right for scores, _ in of_pool.values()]
    return len(read), sum(not close(*pair) for pair in zip(read, right_scores, strict=True))


def main() -> int:
    """Runs for some minutes, prints what was done, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="that ask (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked and changed (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as used:
        os.environ["LOGO_CACHE"] = used
        torch.set_num_threads(1)
        right = expected(pools()[1])
        end = time.monotonic() + 60 * options.minutes
        counts, wrong = churn(engine(), right, options.threads, lambda rounds: time.monotonic() < end, options.seed)
        print(", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
        read, apart = differing(right, used)
    print(f"{read} selections by calibrations that were left on disk: {apart} are wrong")
    for line in wrong:
        print(line)
    return int(bool(wrong or apart))


if __name__ == "__main__":
    sys.exit(main())
