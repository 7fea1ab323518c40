"""`Stream`: the answer to one prompt in pieces, while another thread generates it.

model.generate in a thread -> tokens -> `Text` -> a queue -> pieces -> Stream
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from logo.errors import UsageError
from logo.models import ModelLock
from logo.text import Text

if TYPE_CHECKING:
    from typing_extensions import Self


_PATIENCE = 0.1  # seconds after which a stream that waits for the model looks whether its reader has left


def _nothing() -> None:
    """Begins or ends a stream that computes its pieces where they are asked for."""


class Stream(Iterator[str]):
    """The answer to one prompt in pieces, which together are its text; `LoGo.stream` makes one.

    The generation begins when the first piece is asked for. Whoever leaves a loop over a stream early ends it: with
    `close`, at the end of a `with` block, or when nothing refers to the stream any more, as behind a loop over a stream
    without a name. Streams that are open when the program ends are closed then.

    Args:
        pieces: of the text.
        begin: begins the generation, before the first piece; what it raises, the next piece may be asked for later.
        end: ends the generation and waits for that; may be called from any thread.
    """

    def __init__(
        self, pieces: Iterator[str], begin: Callable[[], None] = _nothing, end: Callable[[], None] = _nothing
    ) -> None:
        self._pieces = pieces
        self._begin = begin
        self._begun = False
        self._end = weakref.finalize(self, end)  # is also called at the exit of the program

    def __next__(self) -> str:
        """The next piece. Raises what the generation raises; UsageError: this thread is answering with the model."""
        if not self._end.alive:
            raise StopIteration
        if not self._begun:
            self._begin()
            self._begun = True
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation, after which the model is free for other calls. There are no more pieces then."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class BackgroundAnswer:
    """One generation in a thread of its own.

    Args:
        text: decodes the tokens.
        lock: of the model, which the thread holds while it generates.
        generate: generates with a streamer and a criterion that ends the generation early.
    """

    def __init__(
        self, text: Text, lock: ModelLock, generate: Callable[[BaseStreamer, StoppingCriteria], object]
    ) -> None:
        self._streamer = _TextStreamer(text)
        self._lock = lock
        self._generate = generate
        self._left = _ReaderLeft()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin(self) -> None:
        """Begins the generation. Raises UsageError: this thread holds the lock, for which the other one would wait."""
        if self._lock.held_here:
            raise UsageError(
                "the model is answering in this thread, and a stream, which answers in another one, would wait for "
                "that for ever: read it once the answer is complete"
            )
        thread = threading.Thread(target=self._work, name="logo-stream", daemon=True)
        thread.start()
        self._thread = thread  # only now, since `end` joins it

    def pieces(self) -> Iterator[str]:
        """Yields the text in pieces, none of them empty, once the generation has begun. Raises what that raises."""
        yield from filter(None, iter(self._streamer.queue.get, None))
        self.end()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Ends the generation, and waits for that, unless this thread holds the lock or is the one that generates."""
        self._left.noticed = True
        thread = self._thread
        if thread is None or thread is threading.current_thread() or self._lock.held_here:
            return
        if thread.is_alive():  # if it is about to begin, it ends at once
            thread.join()

    def _work(self) -> None:
        try:
            if self._got_lock():
                try:
                    self._generate(self._streamer, self._left)
                finally:
                    self._lock.lock.release()
        except BaseException as error:  # raised in the reader's thread
            self._failure = error
        finally:
            self._streamer.queue.put(None)

    def _got_lock(self) -> bool:
        """Takes the lock, unless the reader leaves before it is free, for which nobody waits then."""
        while not self._left.noticed:
            if self._lock.lock.acquire(timeout=_PATIENCE):
                return True
        return False


class _ReaderLeft(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation once its reader has left."""

    def __init__(self) -> None:
        self.noticed = False

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.noticed, device=input_ids.device)


class _TextStreamer(BaseStreamer):  # type: ignore[misc]
    """Takes tokens, those of the prompt first, and passes on the text of the others. Transformers' own streamers drop a
    blank behind a line end and a special token with some tokenizers (Llama 2), and hold symbols back."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._prompted = False
        self.queue: queue.Queue[str | None] = queue.Queue()

    def put(self, value: Tensor) -> None:
        if self._prompted:
            self.queue.put(self._text.push(value.flatten().tolist()))
        self._prompted = True

    def end(self) -> None:
        self.queue.put(self._text.finish())
