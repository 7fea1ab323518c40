"""What LoGo asks of vLLM when a server starts: whether what it relies on still means what it meant.

A text of the pool's calibration has to get the scores that its stored responses give; a probe has to be answered as the
base model answers; and an adapter has to change the answer.
"""

from __future__ import annotations

from logo.core import Selection
from logo.errors import ModelError
from logo.vllm.engine import Engine
from logo.vllm.patches import version
from logo.vllm.requests import Probe, lora_request

_SCORES = 0.5  # how far scores may be apart: fitting adapters' are about ten times as large, and rounding is less
# How far log probabilities of the base model may be apart in two requests, and how far an adapter has to move them.
_NOISE, _EFFECT = 0.05, 1e-5


async def check(engine: Engine) -> None:
    """Asks; raises ModelError, which says what is wrong."""
    from vllm import SamplingParams

    served = engine.served
    signal = next(iter(served.opened))
    [known, *_] = await engine.call("expected", served.pool.digest, signal)
    text = [1, 2, 3] if known is None else known[0]
    if known is not None:
        [found] = await engine.scores(served, signal, [text], [None], plain=True)
        apart = max(abs(one - other) for one, other in zip(found, known[1], strict=True))
        if not apart <= _SCORES:
            raise _changed(f"a text of the calibration has scores that are {apart:.2g} away from those it had")
    sizes = served.opened[signal].selector.sizes
    by_size = sorted(served.pool.names, key=lambda one: sizes.get(one, 0.0))
    # Neither one that does next to nothing, nor one that overflows, which counts as small and would spoil the cache.
    name = by_size[len(by_size) // 2]
    invoked = served.pool[name].activation.tokens
    text = [*text, *invoked][-max(len(text), len(invoked)) :]  # on which it acts
    once = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
    silent = lora_request(Probe("selftest", served.pool.digest, signal))
    async with engine.held([engine.mix(served, Selection.forced({name: 1.0}))]) as [lora]:
        outputs = await engine.run([(text, once, one) for one in (None, silent, lora)])
    await engine.call("scores", ["selftest"])
    base, probe, mixed = ({key: one.logprob for key, one in o.outputs[0].logprobs[0].items()} for o in outputs)

    def within(found: dict[int, float], most: float) -> bool:
        return found.keys() == base.keys() and max(abs(base[token] - found[token]) for token in base) <= most

    if not within(probe, _NOISE):
        raise _changed("a probe is not answered as by the base model")
    if within(mixed, _EFFECT) and sizes.get(name, 1.0) > 0:
        raise _changed(f"adapter {name!r} does not change the answer")


def _changed(what: str) -> ModelError:
    return ModelError(f"LoGo does not work with this vLLM ({version()}): {what}; see docs/vllm.md for known versions")
