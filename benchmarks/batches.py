"""What a batch costs in which every prompt has a mixture of its own, on a base model and a pool of yours.

    python benchmarks/batches.py Qwen/Qwen2.5-Coder-0.5B-Instruct instruct/pool

Prompts are some example prompts of the pool's adapters in a row, cut to the same length. Arms take turns; all are shown
as milliseconds and as multiples of what the base model alone takes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from logo import AdapterPool, LoGo
from parts import answering
from rounds import side_by_side


def arms_of(logo: LoGo, rows: int, tokens: int, new: int, ks: Sequence[int]) -> dict[str, Callable[[], object]]:
    """What is measured: `read` to the first token, `answer` all of them, with fixed mixtures and with selected ones."""
    seeds = itertools.count()

    def batch() -> list[list[int]]:
        return prompts(logo, rows, tokens, next(seeds))

    def answered(texts: list[list[int]], count: int, mixtures: Sequence[Mapping[str, float]]) -> object:
        return answering(logo, texts, count, mixtures)

    base: list[Mapping[str, float]] = [{}] * rows
    arms: dict[str, Callable[[], object]] = {
        "read, base": lambda: answered(batch(), 1, base),
        "answer, base": lambda: answered(batch(), new, base),
        "select": lambda: logo.select(batch(), batch_size=rows),
    }
    for k in ks:
        fixed = batch()
        chosen = [selection.mixture for selection in logo.select(fixed, k=k, batch_size=rows)]
        arms[f"read, k {k}"] = lambda fixed=fixed, chosen=chosen: answered(fixed, 1, chosen)  # type: ignore[misc]
        arms[f"answer, k {k}"] = lambda fixed=fixed, chosen=chosen: answered(fixed, new, chosen)  # type: ignore[misc]
        arms[f"select and answer, k {k}"] = lambda k=k: logo.generate(  # type: ignore[misc]
            batch(), k=k, batch_size=rows, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    return arms


def prompts(logo: LoGo, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """Token ids of so many prompts of so many tokens."""
    examples = [example for adapter in logo.pool for example in adapter.examples]
    rng = random.Random(seed)
    found: list[list[int]] = []
    for _ in range(rows):
        ids: list[int] = []
        while len(ids) < tokens:
            ids += logo.tokenizer(rng.choice(examples))["input_ids"]
        found.append(ids[:tokens])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_model")
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="prompts of the batch")
    parser.add_argument("--tokens", type=int, default=64, help="of each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument("-k", type=int, nargs="+", default=[20, 4], help="adapters per prompt")
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds, after a warm-up round")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(argv)
    if not any(adapter.examples for adapter in AdapterPool.open(options.adapters)):
        raise SystemExit(f"{options.adapters}: expected adapters with example prompts, found none")
    logo = LoGo.from_pretrained(options.base_model, options.adapters, dtype=options.dtype)
    logo.calibrate()
    arms = arms_of(logo, options.rows, options.tokens, options.new, options.k)
    timed = side_by_side(arms, options.rounds, logo.model.device)
    alone = {"read": timed["read, base"].seconds, "answer": timed["answer, base"].seconds}
    alone |= {"select": alone["read"], "select and answer": alone["answer"]}
    for name, arm in timed.items():
        print(f"{name:<26}{1000 * arm.seconds:>9.0f} ms{arm.seconds / alone[name.partition(', ')[0]]:>7.2f}")
    print(
        f"{options.rows} prompts of {options.tokens} tokens, answers of {options.new} · {len(logo.names)} adapters · "
        f"{logo.model.dtype} · {torch.get_num_threads()} threads",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
