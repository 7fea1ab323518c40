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
    every = AdapterPool.open(DEMO_FOLDER / "adapters")
    first, second, *others = every
    return every.subset([one.name for one in others]), [replace(one, name=CHANGED) for one in (first, second)]


def engine() -> LoGo:
    """An engine whose pool has none of the two."""
    from logo.models import load_base

    model, tokenizer = load_base("demo", device="cpu")
    return LoGo(model, tokenizer, pools()[0])


def facts(selection: Selection) -> dict[str, float]:
    """What is compared of a selection."""
    return dict(selection.scores)


def close(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether scores are the same up to rounding."""
    return one.keys() == other.keys() and all(
        abs(one[name] - other[name]) <= CLOSE * (1 + abs(one[name])) for name in one
    )


def answers(logo: LoGo) -> Answers:
    """(signal, prompt) -> scores and text, of the pool as it is."""
    found = {}
    for signal in SIGNALS:
        for prompt in PROMPTS:
            made = logo.generate(prompt, signal=signal, max_new_tokens=TOKENS)
            found[signal, prompt] = facts(made.selection), made.text
    return found


def expected(added: list[Adapter]) -> list[Answers]:
    """The answers of each of the three pools, by engines that never change."""
    found = [answers(engine())]
    for adapter in added:
        logo = engine()
        logo.pool.add(adapter)
        found.append(answers(logo))
    return found


def asked(logo: LoGo, kind: str, signal: str, prompt: str) -> tuple[dict[str, float] | None, str | None]:
    """Scores and text of one call; None for what it does not tell."""
    if kind == "select":
        return facts(logo.select(prompt, signal=signal)), None
    if kind == "generate":
        made = logo.generate(prompt, signal=signal, max_new_tokens=TOKENS)
        return facts(made.selection), made.text
    if kind == "stream":
        return None, "".join(logo.stream(prompt, signal=signal, max_new_tokens=TOKENS))
    chosen = logo.select(prompt, signal=signal)
    try:
        return facts(logo.reselect(chosen, k=1)), None
    except PoolError as error:
        if CHANGED in chosen.scores and "those of 'changed'" in str(error):  # it was removed between the two calls
            return facts(chosen), None
        raise


def churn(logo: LoGo, right: list[Answers], threads: int, goes_on: Callable[[int], bool], seed: int = 0) -> Any:
    """Asks and changes until `goes_on(rounds of a thread)` is false. `right`: as `expected`.

    Returns:
        How often each kind of call was made and the pool was changed; and what was wrong.
    """
    counts, wrong, added = Counter[str](), list[str](), pools()[1]
    done = threading.Event()

    def ask(number: int) -> None:
        draw, rounds = random.Random(f"{seed} {number}"), 0
        try:
            while goes_on(rounds) and not wrong:
                rounds += 1
                kind = draw.choice(("select", "generate", "stream", "reselect"))
                signal, prompt = draw.choice(SIGNALS), draw.choice(PROMPTS)
                scores, text = asked(logo, kind, signal, prompt)
                counts[kind] += 1
                for of_pool in (one[signal, prompt] for one in right):
                    if (scores is None or close(scores, of_pool[0])) and text in (None, of_pool[1]):
                        break
                else:
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
    every = []
    for adapter in (None, *pools()[1]):
        logo = engine()
        if adapter is not None:
            logo.pool.add(adapter)
        every += [facts(logo.select(prompt, signal=signal)) for signal in SIGNALS for prompt in PROMPTS]
    return every


def differing(right: list[Answers], cache: str) -> tuple[int, int]:
    """How many selections another process makes with this cache, and how many of them are not `expected`."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    code = "import churn, json; print(json.dumps(churn.scores_of_all()))"
    environment = {**os.environ, "LOGO_CACHE": cache, "PYTHONPATH": path}
    made = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    found = json.loads(made.stdout.splitlines()[-1])
    wanted = [scores for one in right for scores, _ in one.values()]
    return len(found), sum(not close(one, other) for one, other in zip(found, wanted, strict=True))


def main() -> int:
    """Runs for some minutes, prints what was done, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="that ask (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked and changed (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as used:
        os.environ["LOGO_CACHE"] = used
        torch.set_num_threads(1)
        right, end = expected(pools()[1]), time.monotonic() + 60 * given.minutes
        counts, wrong = churn(engine(), right, given.threads, lambda rounds: time.monotonic() < end, given.seed)
        print(", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
        read, apart = differing(right, used)
    print(f"{read} selections by calibrations that were left on disk: {apart} are wrong")
    for line in wrong:
        print(line)
    return int(bool(wrong or apart))


if __name__ == "__main__":
    sys.exit(main())
