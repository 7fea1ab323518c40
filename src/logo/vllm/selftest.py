"""What LoGo asks of vLLM when a server starts: whether what it relies on still means what it meant.

A text of the pool's calibration has to get the scores that its stored responses give; a probe has to be answered as the
base model answers; and an adapter has to change the answer.
"""

from __future__ import annotations

import math
from typing import Any

from logo.core import Selection
from logo.errors import ModelError
from logo.vllm.engine import Engine
from logo.vllm.patches import version
from logo.vllm.requests import ProbeRequest, lora_request

_SCORES = 0.5  # how far scores may be apart: fitting adapters' are about ten times as large, and rounding is less
# How far log probabilities of the base model may be apart in two requests.
_NOISE = 0.05
# How far an adapter has to move them.
_EFFECT = 1e-5


async def check(engine: Engine) -> None:
    """Asks; raises ModelError, which says what is wrong."""
    from vllm import SamplingParams

    served = engine.served
    signal = next(iter(served.opened))
    [calibrated, *_] = await engine.call("expected", served.pool.digest, signal)
    text = [1, 2, 3]
    if calibrated is not None:
        text, expected = calibrated
        [scores] = await engine.scores(served, signal, [text], [None], without_examples=True)
        difference = max(abs(score - known) for score, known in zip(scores, expected, strict=True))
        if not difference <= _SCORES:
            raise _changed(f"a text of the calibration has scores that are {difference:.2g} away from those it had")
    sizes = served.opened[signal].selector.sizes
    by_size = sorted(served.pool.names, key=lambda name: sizes.get(name, 0.0))
    # Neither one that does next to nothing, nor one that overflows, which counts as small.
    adapter = by_size[len(by_size) // 2]
    invoked = served.pool[adapter].activation.tokens
    text = [*text, *invoked][-max(len(text), len(invoked)) :]  # on which it acts
    once = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
    silent = lora_request(ProbeRequest("selftest", served.pool.digest, signal))
    async with engine.held([engine.mix(served, Selection.forced({adapter: 1.0}))]) as [lora]:
        outputs = await engine.run([(text, once, request) for request in (None, silent, lora)])
    await engine.call("scores", ["selftest"])
    base, probe, mixed = map(_log_probabilities, outputs)
    if not _apart(base, probe) <= _NOISE:
        raise _changed("a probe is not answered as by the base model")
    if _apart(base, mixed) <= _EFFECT and sizes.get(adapter, 1.0) > 0:
        raise _changed(f"adapter {adapter!r} does not change the answer")


def _log_probabilities(output: Any) -> dict[int, float]:
    """Of the most likely first tokens of an answer."""
    [answer] = output.outputs
    return {token: place.logprob for token, place in answer.logprobs[0].items()}


def _apart(base: dict[int, float], other: dict[int, float]) -> float:
    """How far the log probabilities of two answers are apart; infinitely, if other tokens are the most likely ones."""
    if base.keys() != other.keys():
        return math.inf
    return max(abs(base[token] - other[token]) for token in base)


def _changed(what: str) -> ModelError:
    return ModelError(f"LoGo does not work with this vLLM ({version()}): {what}; see docs/vllm.md for known versions")
