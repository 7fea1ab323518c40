"""Transcripts in the pages: what is typed after `$`, what stands below it, and whether a run says the same.

The rules, all of them:

- A line of a code block that begins with `$ ` is a command, and the lines below it are what it printed. A command goes
  on after a backslash and on lines that begin with `> `. Commands without `$` are only parsed.
- The commands of one page run one after the other in one folder, which begins with links to the repository's own.
- A server whose lines go to a file (`logo serve ... 2> FILE`) ends before the first command that names the file.
- A fenced block that begins with `# folder/name.ext`, or whose fence says `title="folder/name.ext"`, is that file.
- A line that begins with `...` stands for any number of lines. A command with nothing below it only has to succeed.
- A command that names a base model other than `demo` is not run, and neither is one that measures times
  (`python benchmarks/...`): `why_not_run` says so.
- Times, ids and digests are not compared: numbers before a unit of time or in a column of `seconds`, the fields of
  `STAMP`, sixteen and more hexadecimal digits. Bars are not compared either; their number stands beside them.
- All other numbers count. Those without a point are exact; those with one may differ by one in the last digit shown, or
  by the tolerance of scores. Numbers like `9.5e-08` below 1e-5 are rounding errors, which only have to be small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

from tolerances import SCORES

TIME = re.compile(r"\d[\d.,]*(?= ?(?:ms|s|min|h)\b)")
TIMES = re.compile(r"\bseconds\b")  # in the head of a column
STAMP = re.compile(r'("(?:id|created|[a-z]+_ms)": )(?:"[^"]*"|[\d.]+)')
DIGEST = re.compile(r"(?<![\w.])[0-9a-f]{16,}\b")
BAR = re.compile(r"[█▏▎▍▌▋▊▉]+")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
MODEL = re.compile(r"\bbase[-_]model[ =]([^\s,]+)")


@dataclass(frozen=True)
class Transcript:
    """One command of a page and what the page says it prints."""

    page: str
    line: int
    command: str
    shown: str

    @property
    def why_not_run(self) -> str | None:
        """What a machine with nothing but the bundled model lacks for it."""
        named = MODEL.search(self.command)
        if named and named[1] != "demo":
            return f"needs the model {named[1]}"
        if self.command.startswith("python benchmarks/"):
            return "measures times"
        return None


def transcripts(page: Path) -> list[Transcript]:
    """All of a page, in order."""
    found = []
    for start, block in _blocks(page.read_text()):
        at = [i for i, line in enumerate(block) if line.startswith("$ ")]
        for first, end in pairwise([*at, len(block)]):
            last = first
            while last + 1 < end and (block[last].endswith("\\") or block[last + 1].startswith("> ")):
                last += 1
            command = "\n".join(line.removeprefix("$ ").removeprefix("> ") for line in block[first : last + 1])
            shown = "\n".join(block[last + 1 : end]).strip("\n")
            found.append(Transcript(page.name, start + first, command, shown))
    return found


def files(page: Path) -> dict[str, str]:
    """The files that a page shows, by their paths."""
    text = page.read_text()
    titled = re.findall(r'^```\w+ title="(\S+)"\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)
    headed = re.findall(r"^```\w+\n(# (\S+/\S+\.\w+)\n.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return dict(titled) | {path: content for content, path in headed}


def difference(shown: str, said: str) -> str | None:
    """Where a run does not say what is shown, or None."""
    got = _comparable(said)
    parts: list[list[str]] = [[]]
    for line in _comparable(shown):
        if line.startswith("..."):
            parts.append([])
        else:
            parts[-1].append(line)
    at = 0
    for i, part in enumerate(parts):
        last = len(got) - len(part)
        first, end = at, last + 1
        if i == 0:
            end = 1
        elif i == len(parts) - 1 and part:
            first = max(at, last)  # nothing may follow the last lines
        place = max(range(first, max(end, first + 1)), key=lambda place: _agreeing(part, got[place:]))
        if _agreeing(part, got[place:]) < len(part):
            return _told(part, got[place : place + len(part)])
        at = place + len(part)
    return _told([], got[at:]) if parts[-1] and at < len(got) else None


def same_number(one: str, other: str) -> bool:
    """Whether two numbers may be one, printed on two machines."""
    if one == other:
        return True
    if "." not in one or "." not in other:
        return False
    a, b = (float(text.replace(",", "").replace("−", "-")) for text in (one, other))
    if "e-" in one and "e-" in other and max(abs(a), abs(b)) < 1e-5:
        return True
    unit = float(f"1e-{len(one.partition('e')[0].partition('.')[2])}") * (10 ** int((one.partition("e")[2]) or 0))
    return abs(a - b) <= max(1.001 * unit, SCORES * abs(a))


def _blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, lines without indent) of the code blocks: fenced ones, and those indented by four."""
    block: list[str] = []
    fenced, start = False, 0
    for number, line in enumerate([*text.splitlines(), "end"], start=1):
        fence = line.startswith("```")
        if fenced and not fence:
            block.append(line)
        elif not fence and (line.startswith("    ") or (block and not line)):
            start = start if block else number
            block.append(line.removeprefix("    "))
        else:
            if block:
                yield start, block
            block, start = [], number + 1
        fenced = fenced != fence


def _comparable(text: str) -> list[str]:
    """The lines of an output, with what is not compared taken out."""
    text = text.strip("\n")
    try:
        text = json.dumps(json.loads(text), indent=1, ensure_ascii=False)
    except ValueError:
        text = "\n".join(_without_columns_of_times(text.splitlines()))
    for pattern, put in ((STAMP, r"\1<>"), (DIGEST, "<>"), (TIME, "<>"), (BAR, "")):
        text = pattern.sub(put, text)
    return [" ".join(line.split()) for line in text.splitlines()]


def _without_columns_of_times(lines: list[str]) -> Iterator[str]:
    spans: list[tuple[int, int]] = []
    for line in lines:
        heads = [match.span() for match in TIMES.finditer(line)]
        if heads or not line.strip():
            spans = heads
        times = [n.span() for n in NUMBER.finditer(line) if any(n.start() < b and a < n.end() for a, b in spans)]
        for start, end in reversed(times):
            line = f"{line[:start]}<>{line[end:]}"
        yield line


def _agreeing(part: list[str], lines: list[str]) -> int:
    return sum(map(_same_line, part, lines))


def _same_line(one: str, other: str) -> bool:
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    return all(map(same_number, NUMBER.findall(one), NUMBER.findall(other)))


def _told(part: list[str], got: list[str]) -> str:
    """The lines that were looked for beside what was there; `!` marks those that differ."""
    rows = []
    for one, other in zip_longest(part, got, fillvalue="(nothing)"):
        rows.append(f"  {one}" if _same_line(one, other) else f"! shown {one}\n! found {other}")
    return "\n".join(rows)
