"""How large the project is: lines of source and tests, words of docs, commands and their option slots.

    PYTHONPATH=src python tools/count.py [FOLDER]

An option slot is one option of one command; arguments and `--help` are left out. The commands are those of the `logo`
package that Python finds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from logo.cli.app import app


def lines(files: list[Path]) -> int:
    """Lines of these files."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def commands(group: Any) -> Iterator[Any]:
    """The commands of a group and of the groups in it."""
    if not hasattr(group, "commands"):
        yield group
    for one in getattr(group, "commands", {}).values():
        yield from commands(one)


def main(folder: Path) -> None:
    """Prints the numbers."""
    source, tests = sorted((folder / "src").rglob("*.py")), sorted((folder / "tests").rglob("*.py"))
    benchmarks = sorted((folder / "benchmarks").rglob("*.py"))
    docs = [folder / "README.md", *sorted((folder / "docs").rglob("*.md"))]
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in docs)
    found = list(commands(get_command(app)))
    slots = sum(one.param_type_name == "option" for command in found for one in command.params)
    print(f"source      {lines(source):7,} lines in {len(source)} files")
    print(f"benchmarks  {lines(benchmarks):7,} lines in {len(benchmarks)} files")
    print(f"tests       {lines(tests):7,} lines in {len(tests)} files")
    print(f"docs        {words:7,} words in {len(docs)} pages")
    print(f"commands    {len(found):7,} with {slots} option slots")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)
