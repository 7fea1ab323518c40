"""Commands that kill themselves before a given step, so that they die at the same point on every machine.

Steps are changes of files below the folder of results, and the calls that a test names.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from warm import python

# Ends the command given before the step given (-1: never), and writes to the file given how many steps it made.
Dying = Callable[[int, Sequence[str], Path], int]

# Loads what is slow to load, and is then the parent of one process for every line that it reads: the step before which
# that one dies, its command, the folder of its results and a file for the number of steps. Answers with how it ended.
_PARENT = """
import io, json, os, signal, sys
from logo.cli.app import run
{imports}

def count(last, root):
    done = [0]

    def step():
        if done[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1

    def counted(function):
        def call(*arguments, **options):
            step()
            return function(*arguments, **options)
        return call

    def happening(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(root):
            step()

    os.fsync = counted(os.fsync)
{steps}
    sys.addaudithook(happening)
    return done

for line in sys.stdin:
    last, arguments, root, steps = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        done = count(last, root)
        code = run(arguments)
        with open(steps, "w") as file:
            file.write(str(done[0]))
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@contextmanager
def dying(option: str, imports: str, steps: str) -> Iterator[Dying]:
    """What runs commands up to a step.

    Args:
        option: of a command, which names the folder of its results.
        imports: Python lines that load what is slow to load.
        steps: Python lines, indented by four, that replace functions `f` by `counted(f)`, or call `step()`.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    code = _PARENT.replace("{imports}", imports).replace("{steps}", steps)
    with subprocess.Popen([*python(), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:

        def run_until(step: int, command: Sequence[str], file: Path) -> int:
            assert parent.stdin is not None and parent.stdout is not None
            line = [step, list(command), command[command.index(option) + 1], str(file)]
            print(json.dumps(line), file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        yield run_until
        assert parent.stdin is not None
        parent.stdin.close()
