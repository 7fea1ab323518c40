"""Commands that kill themselves before a given step, so that they die at the same point on every machine.

Steps are changes of files below the folder of results, and the calls that a test names.
"""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from warm import python

# Ends the command given before the step given (-1: never), and writes to the file given how many steps it made.
Dying = Callable[[int, Sequence[str], Path], int]

_CODE = """
import io, os, signal, sys
from logo.cli.app import run
{imports}
last, root, steps, *arguments = sys.argv[1:]
done = 0

def step():
    global done
    if done == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1

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
code = run(arguments)
with open(steps, "w") as file:
    file.write(str(done))
os._exit(code)
"""


@contextmanager
def dying(option: str, imports: str, steps: str) -> Iterator[Dying]:
    """What runs commands up to a step.

    Args:
        option: of a command, which names the folder of its results.
        imports: Python lines that load what is slow to load, before steps are counted.
        steps: Python lines that replace functions `f` by `counted(f)`, or call `step()`.
    """
    code = _CODE.replace("{imports}", imports).replace("{steps}", textwrap.dedent(steps))

    def run_until(step: int, command: Sequence[str], file: Path) -> int:
        words = [str(step), command[command.index(option) + 1], str(file), *command]
        return subprocess.run([*python(), "-c", code, *words], stdout=subprocess.DEVNULL).returncode

    yield run_until
