"""`Turns`: whose turn it is with the model, the thread that generates step by step, or those who pause it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from logo.api.errors import NotReady

STOPPED = "generation has stopped; restart the server"


class Turns:
    """The turns of one thread that makes steps, while `has_work` says that there is something to do, and of others that
    pause it. Between two pauses there is a step, so that neither starves. Whoever changes what `has_work` looks at
    holds the lock, and notifies."""

    def __init__(self, has_work: Callable[[], bool]) -> None:
        self.lock = threading.Condition()
        self.stopped = False
        self._has_work = has_work
        self._stepping = False
        self._wishing = 0  # how many threads wait for a pause or have one
        self._pausing = 0  # how many have one
        self._step_is_due = False  # before the next pause, since the last one kept the work waiting

    @property
    def pause_is_wished(self) -> bool:
        """Whether somebody waits for a pause or has one."""
        return self._wishing > 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """No step is made inside the block. NotReady: the thread has stopped."""
        with self.lock:
            self._wishing += 1
            self.lock.wait_for(lambda: self.stopped or not (self._stepping or self._step_is_due))
            if self.stopped:
                self._wishing -= 1
                raise NotReady(STOPPED)
            self._pausing += 1
        try:
            yield
        finally:
            with self.lock:
                self._wishing -= 1
                self._pausing -= 1
                self._step_is_due = self._has_work()
                self.lock.notify_all()

    def next_step(self) -> bool:
        """Ends the present step, and waits until the next one may begin; false: the thread has to end."""
        with self.lock:
            self._stepping = False
            self.lock.notify_all()
            self.lock.wait_for(lambda: self.stopped or self._may_step())
            self._stepping = not self.stopped
            self._step_is_due = False
            return self._stepping

    def _may_step(self) -> bool:
        others = self._pausing if self._step_is_due else self._wishing
        return not others and self._has_work()

    def stop(self) -> None:
        """Ends the thread after its present step, and all waiting."""
        with self.lock:
            self.stopped = True
            self.lock.notify_all()

    def ended(self) -> None:
        """The thread has ended, for whatever reason: nobody waits for it any more."""
        with self.lock:
            self.stopped = True
            self._stepping = False
            self.lock.notify_all()
