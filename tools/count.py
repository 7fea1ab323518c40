"""How large the project is: lines of source and tests, words of docs, commands and their option slots.

    PYTHONPATH=src python tools/count.py [FOLDER]

An option slot is one option of one command; arguments and `--help` are left out. The commands are those of the `logo`
package that Python finds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App

from logo.cli.app import app


def lines(files: list[Path]) -> int:
    """Lines of these files."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def commands(group: App) -> Iterator[App]:
    """The commands of a group and of the groups in it."""
    for command in (group[name] for name in group if not name.startswith("-")):
        if command.default_command is not None:
            yield command
        yield from commands(command)


def options(command: App) -> int:
    """The number of a command's options; a dataclass of options is none itself."""
    found = [one for one in command.assemble_argument_collection() if not list(one.children)]
    return sum(any(name.startswith("-") for name in one.names) for one in found)


def main(folder: Path) -> None:
    """Prints the numbers."""
    source, tests = sorted((folder / "src").rglob("*.py")), sorted((folder / "tests").rglob("*.py"))
    benchmarks = sorted((folder / "benchmarks").rglob("*.py"))
    docs = [folder / "README.md", *sorted((folder / "docs").rglob("*.md"))]
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in docs)
    found = list(commands(app))
    slots = sum(map(options, found))
    print(f"source      {lines(source):7,} lines in {len(source)} files")
    print(f"benchmarks  {lines(benchmarks):7,} lines in {len(benchmarks)} files")
    print(f"tests       {lines(tests):7,} lines in {len(tests)} files")
    print(f"docs        {words:7,} words in {len(docs)} pages")
    print(f"commands    {len(found):7,} with {slots} option slots")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)
