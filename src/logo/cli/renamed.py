"""Names that the command line had before; each works for one version and says what it is called now."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

# Old command: where it is now. They are not in the help.
COMMANDS: dict[str, tuple[str, ...]] = {
    "sweep": ("eval", "sweep"),
    "compare": ("eval", "compare"),
    "report": ("eval", "report"),
    "merge-results": ("eval", "merge"),
    "study": ("eval", "study"),
    "lm-eval": ("eval", "lm-eval"),
    "calibrate": ("pool", "calibrate"),
    "datasets": ("data",),
}

# Old option: what it is called now, in the commands that have the new one and no other of the old name.
OPTIONS: dict[str, str] = {
    "selection-strategy": "signal",
    "gpu": "device",
    "file": "prompts",
    "heatmap": "png",
    "png": "pictures",  # a folder
    "only": "tasks",
    "rows": "limit",  # a number
    "train-rows": "train-limit",  # a number
}

# Commands whose `--json` named a file.
_JSON_FILES = ("study", "bench", "serve", "train")

# What the official script and `logo evaluate` call an option for ever, with its placeholder and text in the help.
OFFICIAL: dict[str, tuple[tuple[str, ...], str | None, str | None]] = {
    "signal": (("--selection-strategy", "--signal"), None, None),
    "device": (("--gpu", "--device"), "N", "GPU number, if there is one; -1 is the CPU."),
}


def say_renamed(old: str, new: str) -> None:
    """One line on stderr that tells the user what to type from now on."""
    print(f"logo: note: {old} is called {new} now; the old name stops working with the next version", file=sys.stderr)


def modernised(arguments: Sequence[str], known: Collection[str], command: str) -> Iterator[str]:
    """A command's arguments with the current names of its options; prints a note for each old name.

    Args:
        known: the command's options, with their dashes.
        command: its name.
    """
    named = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            yield from (argument, *rest)
            return
        name, equals, value = argument.partition("=")
        old = name.replace("_", "-")
        new = f"--{OPTIONS.get(old[2:], '')}" if old.startswith("--") and old not in known else ""
        given = value if equals else next(iter(rest[:1]), "-")
        if old == "--json" and command in _JSON_FILES and "--save" in known and not given.startswith("-"):
            new = "--save"  # it named a file; now it prints
        elif old == "--tasks" and command == "train" and "--rows" not in named:
            # It named a folder; now it names tasks of `--rows`, which may be in a file of options.
            new = "--rows" if "--only" in named or Path(given).is_dir() else ""
        if new not in known:
            yield argument
            continue
        say_renamed(old, new)
        yield f"{new}{equals}{value}"
