"""usage: warm_parent.py LISTENING-FD LISTENING-FD

Becomes, at the first connection, two parents of processes: one has imported PyTorch and transformers; the other, for
commands with variables that transformers and the Hub's client read when they are imported, has imported PyTorch alone.
Both fork a process for each connection of a `warm_client.py` to their socket, until their standard input ends. See
`warm.py`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from dataclasses import dataclass
from types import ModuleType

# Of these, the first is read by what is forked, and imports of Ray, lm-eval and `tools` set the others in tests.
MAY_DIFFER = {"PYTHONPATH", "PYTHONBREAKPOINT", "HF_XET_HIGH_PERFORMANCE", "OMP_WAIT_POLICY"}
ENVIRONMENT = dict(os.environ)  # as it is before PyTorch sets variables


@dataclass(frozen=True)
class Imports:
    """Modules to import, and how the names of variables begin that they, or Python, read only once."""

    modules: tuple[str, ...]
    read: tuple[str, ...]


TORCH = Imports(
    (
        *("torch._dynamo.convert_frame", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes"),
        *("torch.utils.checkpoint", "scipy.optimize", "numpy", "yaml", "jinja2", "PIL.Image", "regex", "psutil"),
        *("pydantic", "asyncio", "cyclopts", "http.client", "email.message"),
    ),
    ("PYTHON", "LANG", "LC_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH", "CUDA"),
)
TRANSFORMERS = Imports(
    (
        *("transformers.modeling_utils", "transformers.models.auto", "transformers.models.llama.modeling_llama"),
        *("transformers.masking_utils", "transformers.tokenization_utils_tokenizers", "transformers.generation"),
        *("transformers.loss.loss_utils", "huggingface_hub"),
    ),
    (*TORCH.read, "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HOME", "XDG_", "HTTP", "http", "no_proxy", "NO_PROXY"),
)


@dataclass(frozen=True)
class Asked:
    """What an interpreter is asked for: its arguments and what else a process inherits."""

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    streams: list[int]

    @property
    def _words(self) -> list[str]:
        return self.arguments[self.arguments[:1] == ["-B"] :]

    def forks(self, imported: Imports) -> bool:
        """Whether a fork of a process that has imported these does the same as an interpreter that starts now."""
        first = next(iter(self._words), "-")
        names = {name for name in {*ENVIRONMENT, *self.environment} if name.startswith(imported.read)} - MAY_DIFFER
        # What PyTorch has set in this process it has set in those of tests, too.
        same = all(self.environment.get(name) in (ENVIRONMENT.get(name), os.environ.get(name)) for name in names)
        return same and (first in ("-c", "-m") or not first.startswith("-"))

    def run(self) -> None:
        """Becomes that interpreter."""
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        for number, stream in enumerate(self.streams):
            os.dup2(stream, number)
            os.close(stream)
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            old = getattr(sys, name)
            file = os.fdopen(old.fileno(), mode, encoding=old.encoding, errors=old.errors, closefd=False)
            setattr(sys, name, file)
        sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.dont_write_bytecode = len(self._words) < len(self.arguments)
        first, *rest = self._words
        path = [found for found in self.environment.get("PYTHONPATH", "").split(os.pathsep) if found]
        if first == "-c":
            sys.path[:1] = ["", *path]
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec", dont_inherit=True), main.__dict__)
        elif first == "-m":
            sys.path[:1] = [self.folder, *path]
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[:1] = [os.path.dirname(os.path.realpath(first)), *path]
            sys.argv = self._words
            runpy.run_path(os.path.abspath(first), run_name="__main__")


def asked_by(client: socket.socket) -> Asked | None:
    """What a client asks for; None if the client was killed before it had sent all of it."""
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb") as file:
        asked = file.read(int.from_bytes(size, "big"))
    whole = len(size) == 4 and len(asked) == int.from_bytes(size, "big")
    return Asked(**json.loads(asked), streams=streams) if whole else None


def serve(imported: Imports, listening: socket.socket, until: int) -> Asked | None:
    """In the forks that clients ask for, what they are asked for; None once `until` can be read.

    Between a client and its fork stands another fork, which tells the client how it ends, and ends it with the client.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that stand between
    while until not in select.select([listening, until], [], [])[0]:
        client, _ = listening.accept()
        if os.fork():
            client.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listening.close()
        asked = asked_by(client)
        pid = os.fork() if asked is not None and asked.forks(imported) else -1
        if not pid:
            client.close()
            os.close(until)
            return asked
        for stream in () if asked is None else asked.streams:
            os.close(stream)
        with contextlib.suppress(OSError):  # the client was killed
            client.sendall(b"%d\n" % max(pid, 0))
            if pid > 0:
                select.select([os.pidfd_open(pid), client, until], [], [])
                os.kill(pid, signal.SIGKILL)  # changes nothing where it has ended
                client.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    return None


def imports(modules: Imports) -> None:
    for name in modules.modules:
        with contextlib.suppress(Exception):  # not installed, or not whole: then a command meets that itself
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that a fork's collections do not copy these pages


if __name__ == "__main__":
    with_torch, with_transformers = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    until = os.dup(0)
    select.select([with_torch, with_transformers, until], [], [])
    imports(TORCH)
    if os.fork():
        with_transformers.close()
        asked = serve(TORCH, with_torch, until)
    else:
        with_torch.close()
        imports(TRANSFORMERS)
        asked = serve(TRANSFORMERS, with_transformers, until)
    if asked is not None:
        asked.run()
