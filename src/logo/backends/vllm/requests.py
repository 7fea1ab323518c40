"""vLLM's offline engine, stepped by the threads that wait for answers.

    start -> (step, step, ...: the awaited requests and all others that run) -> Running.tokens

Requests of several callers share steps, also those of a stream whose reader is busy. Token ids in, token ids out: stop
rules other than end tokens are the caller's, as in the local engine.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from logo.backends.vllm.core import new_key
from logo.endings import EndRule
from logo.errors import UsageError


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Converts vLLM's refusal of a request into a UsageError."""
    import vllm.exceptions

    try:
        yield
    except (ValueError, vllm.exceptions.VLLMClientError) as error:
        raise UsageError(f"vLLM refuses {what}: {' '.join(str(error).split())}") from error


@dataclass
class Running:
    """A running request.

    Attributes:
        key: vLLM's id of it.
        rules: stop rules besides its end tokens.
        tokens: the new ones so far.
        finite: whether the logits of every token were finite, if log probabilities were requested.
        done: whether it has ended.
        last: vLLM's last output.
    """

    key: str
    rules: Sequence[EndRule] = ()
    tokens: list[int] = field(default_factory=list)
    finite: bool = True
    done: bool = False
    last: Any = None

    def take(self, output: Any) -> None:
        """Adds the output of a step: its tokens up to the first at which a stop rule applies."""
        self.last, self.done = output, output.finished
        [made] = output.outputs
        for place, token in enumerate(made.token_ids):
            self.tokens.append(token)
            if made.logprobs:
                self.finite &= math.isfinite(made.logprobs[place][token].logprob)
            if any(rule(self.tokens) for rule in self.rules):
                self.done = True
                break


class Requests:
    """The requests of one engine.

    Args:
        engine: vLLM's `LLMEngine`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._running: dict[str, Running] = {}
        self._lock = threading.RLock()

    @contextmanager
    def together(self) -> Iterator[Group]:
        """Yields a group of requests; those that still run at the end of the block are stopped."""
        group = Group(self)
        try:
            yield group
        finally:
            self.stop(group.running)

    def start(self, ids: Sequence[int], parameters: Any, lora: Any = None, rules: Sequence[EndRule] = ()) -> Running:
        """See `Group.start`; the caller has to `stop` the request."""
        running = Running(new_key(), rules)
        with self._lock:
            with refused(f"a prompt of {len(ids)} tokens"):
                self._engine.add_request(running.key, {"prompt_token_ids": list(ids)}, parameters, lora_request=lora)
            self._running[running.key] = running
        return running

    def step(self) -> None:
        """Runs one step of the engine, for all running requests of all callers."""
        with self._lock:
            ended = []
            for output in self._engine.step():
                running = self._running.get(output.request_id)
                if running is not None:
                    running.take(output)
                    if running.done:
                        del self._running[running.key]
                        if not output.finished:
                            ended.append(running.key)
            if ended:
                self._engine.abort_request(ended)

    def stop(self, requests: Sequence[Running]) -> None:
        """Ends those of the requests that still run."""
        with self._lock:
            left = [one.key for one in requests if self._running.pop(one.key, None) is not None]
            if left:
                self._engine.abort_request(left)


class Group:
    """Requests of one caller, see `Requests.together`.

    Attributes:
        running: all of them, in the order in which they were started.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.running: list[Running] = []

    def start(self, ids: Sequence[int], parameters: Any, lora: Any = None, rules: Sequence[EndRule] = ()) -> Running:
        """Puts a request into the queue.

        Args:
            ids: token ids of the prompt.
            parameters: vLLM's `SamplingParams`; with rules they have to ask for every token as it comes.
            lora: vLLM's `LoRARequest`.
            rules: stop rules besides its end tokens.

        Raises:
            UsageError: vLLM refuses it.
        """
        self.running.append(self._requests.start(ids, parameters, lora, rules))
        return self.running[-1]

    def wait(self) -> None:
        """Runs steps until all requests of the group are done."""
        while not all(one.done for one in self.running):
            self._requests.step()

    def pieces(self) -> Iterator[list[int]]:
        """The tokens of the only request, a few at a time as they come."""
        [one] = self.running
        sent = 0
        while not one.done or sent < len(one.tokens):
            if sent == len(one.tokens):
                self._requests.step()
            new, sent = one.tokens[sent:], len(one.tokens)
            if new:
                yield new
