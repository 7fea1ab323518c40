"""Plugins: signals, methods and metrics of others beside ours, by name.

A module registers what is in it when it is imported, by `logo.register_signal` and its like. Every command, every
process that one starts, and `LoGo.from_pretrained` import first what `LOGO_PLUGINS` and entry points name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from logo.errors import LoGoError, PluginError, UsageError, closest, is_out_of_memory

T = TypeVar("T")

VARIABLE = "LOGO_PLUGINS"


@contextmanager
def running(plugin: str) -> Iterator[None]:
    """Names a plugin, by its kind and name, in an error of its code; LoGo's own and missing memory stay as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LoGoError) or is_out_of_memory(error):
            raise
        raise RuntimeError(f"{plugin} failed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Definition:
    """Where a plugin is defined (`module:Object`), the SHA-256 in hex of its file or top-level package, and the folder
    that it is imported from, None where no other process can import it, as from a notebook."""

    place: str
    digest: str
    folder: str | None

    @classmethod
    def of(cls, plugin: Any) -> Definition:
        """The definition of a function or class."""
        name: str = plugin.__module__
        file = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
        if file is None:
            try:
                text = inspect.getsource(plugin).encode()
            except (OSError, TypeError):  # as in a prompt: nobody knows its text, and could notice a change
                text = os.urandom(16)
            return cls(_place(plugin), hashlib.sha256(text).hexdigest(), None)
        top = Path(file).absolute()
        package = top.stem == "__init__"
        files = sorted(top.parent.rglob("*.py")) if package else [top]
        text = b"".join(source.read_bytes() for source in files)
        folder = None if name == "__main__" else str(top.parents[package])
        return cls(_place(plugin), hashlib.sha256(text).hexdigest(), folder)

    def __str__(self) -> str:
        return f"{self.place} {self.digest}"


class Registry(dict[str, T]):
    """The signals, methods or metrics (`kind`, for messages) by name, and the `definitions` of those that are plugins.
    Raises UsageError when a name is looked up that nobody registers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.definitions: dict[str, Definition] = {}
        self._places: dict[str, str] = {}
        _REGISTRIES.append(self)

    def add(self, name: str, value: T, plugin: Any) -> None:
        """Registers a value that comes from a function or class. If a module is reloaded, its new definition replaces
        the old one. Raises UsageError for a name that is taken or cannot be one."""
        place = _place(plugin)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise UsageError(f"{self.kind} {name!r} ({place}): expected a name of letters, digits, '-' and '_'")
        taken = self._places.setdefault(name, place)
        if taken != place:
            raise UsageError(f"{self.kind} {name!r} ({place}): the name is taken by {taken}; choose another one")
        if not place.startswith("logo."):
            self.definitions[name] = Definition.of(plugin)
        self[name] = value

    def __missing__(self, name: str) -> T:
        hint = f"{closest(str(name), self)}; known: {', '.join(self)}"
        raise UsageError(f"unknown {self.kind} {name!r}{hint}; one of a plugin needs --plugin (or {VARIABLE})")

    def definition(self, name: str) -> str | None:
        """The definition and name of a plugin (one may have several), on which results depend; None for LoGo's own."""
        return f"{self.definitions[name]} {name}" if name in self.definitions else None


_REGISTRIES: list[Registry[Any]] = []
_LOADED: dict[str, None] = {}


def load(plugin: str, folder: str = "") -> None:
    """Imports the module of a plugin (`module:Object`), which registers what is in it; if it is not installed, from
    `folder`. Raises PluginError if it cannot be imported, or does not register the object."""
    module, _, name = plugin.partition(":")
    try:
        if folder and folder not in sys.path and importlib.util.find_spec(module.partition(".")[0]) is None:
            sys.path.append(folder)  # at the end, so that nothing there takes the place of what is installed
        definition = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(f"plugin {plugin!r}: expected an importable module:Object ({reason})") from error
    if not any(_place(definition) in registry._places.values() for registry in _REGISTRIES):
        raise PluginError(f"plugin {plugin!r}: expected an object under @logo.register_..., found {definition!r:.60}")
    _LOADED[plugin] = None


def load_installed() -> None:
    """Imports the plugins that the environment and installed distributions name, unless that is done. Errors as `load`;
    UsageError if they are not named as they should be."""
    for entry in [*_words(os.environ.get(VARIABLE, "")), *_installed()]:
        plugin, _, folder = entry.partition("@")
        if plugin not in _LOADED:
            load(plugin, folder)


def named() -> list[str]:
    """The plugins of this process, as `module:Object`, that have to be named with `--plugin` to repeat its run."""
    return [plugin for plugin in _LOADED if plugin not in _installed()]


def environment() -> dict[str, str]:
    """The environment in which another process finds the plugins of this one; empty without plugins."""
    words = dict.fromkeys(_words(os.environ.get(VARIABLE, "")))
    for registry in _REGISTRIES:
        for definition in registry.definitions.values():
            if definition.folder is not None:
                words[f"{definition.place}@{definition.folder}"] = None
    return {VARIABLE: shlex.join(words)} if words else {}


def _installed() -> list[str]:
    return [entry.value for entry in importlib.metadata.entry_points(group="logo.plugins")]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{VARIABLE} {text!r}: expected module:Object, several with spaces ({error})") from None


def _place(definition: Any) -> str:
    return f"{getattr(definition, '__module__', '')}:{getattr(definition, '__qualname__', type(definition).__name__)}"
