"""The cost of reading prompts once: the same model and pool, with adapters that act on the last tokens only.

Every arm gets new prompts, except for the beginning that the cached ones share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import DynamicCache

from logo.bench.parts import Bench, MeasuredPart, answering
from logo.bench.probe import prefill
from logo.bench.rounds import side_by_side
from logo.bench.synthetic import related_mixtures
from logo.engine import LoGo
from logo.selection.prefixes import reusable
from logo.selection.probe import cache_argument

# The adapters act on the last tokens of the prompt, which open the answer, as in many public pools.
ACTIVATION = "last:4"


def reading_once(bench: Bench) -> LoGo:
    """An engine on the bench's model and pool that reads prompts once; the pool is calibrated."""
    logo = bench.logo
    settings = replace(logo.settings, signal="calibrated", activation=ACTIVATION)
    made = LoGo(logo.model, logo.tokenizer, logo.pool, settings=settings)
    made.calibrate()
    return made


def once_prefill(bench: Bench, once: LoGo, tokens: int, prefix: int, own: int) -> MeasuredPart:
    """From a prompt to its first token: by the base model alone, with selection and mixture, and both for a prompt
    whose first `prefix` tokens are cached.
    """
    bench.say("read once")
    [shared] = bench.prompts(1, prefix)
    arms: dict[str, Callable[[], object]] = {
        "prefill": lambda: answering(bench.logo, bench.prompts(1, tokens), 1, [{}]),
        "once": lambda: answering(once, bench.prompts(1, tokens), 1),
        "long prefill": lambda: answering(bench.logo, bench.prompts(1, prefix + own), 1, [{}]),
        "long, once": lambda: answering(once, bench.prompts(1, prefix + own), 1),
        "cached, once": lambda: answering(once, [f"{shared} {bench.prompts(1, own)[0]}"], 1),
    }
    if reusable(bench.logo.model):
        arms["cached prefill"] = _cached_prefill(bench, shared, prefix, own)
    counts = {"tokens": tokens, "prefix": prefix}
    return MeasuredPart("read once", side_by_side(arms, bench.rounds, device=bench.device), counts)


def _cached_prefill(bench: Bench, shared: str, prefix: int, own: int) -> Callable[[], object]:
    """The base model alone reads `own` new tokens behind `prefix` tokens whose keys and values it keeps."""
    model, encode = bench.logo.model, bench.logo.prompts.encode
    cache = DynamicCache()
    options = {cache_argument(model) or "": cache}

    def arm() -> None:
        new = encode(bench.prompts(1, own))[0][:own]
        prefill(model, [new], **options)
        cache.crop(-len(new))

    prefill(model, [encode([shared])[0][:prefix]], **options)
    return arm


def once_end_to_end(bench: Bench, once: LoGo, batch: int, tokens: int, new: int) -> MeasuredPart:
    """From prompts to answers of `new` tokens, as `Bench.end_to_end`, by the engine that reads prompts once."""
    bench.say(f"read once, end to end, batch {batch}")
    arms: dict[str, Callable[[], object]] = {
        "base": lambda: answering(bench.logo, bench.prompts(batch, tokens), new, [{}] * batch),
        "once": lambda: answering(once, bench.prompts(batch, tokens), new),
    }
    if batch > 1:
        seeds = itertools.count()

        def related() -> Sequence[object]:
            texts = bench.prompts(batch, tokens)
            once.select(texts, batch_size=batch, max_new_tokens=new)
            return answering(once, texts, new, related_mixtures(once.names, batch, bench.k, seed=next(seeds)))

        arms["once, related"] = related
    return MeasuredPart(
        f"read once, batch {batch}", side_by_side(arms, bench.rounds, device=bench.device), {"new": new}
    )
