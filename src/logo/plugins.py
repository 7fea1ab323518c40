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
class Source:
    """Where a plugin is defined (`module:Object`), the SHA-256 in hex of its file or top-level package, and the folder
    that it is imported from, None where no other process can import it, as from a notebook."""

    place: str
    digest: str
    folder: str | None

    @classmethod
    def of(cls, definition: Any) -> Source:
        """The source of a function or class."""
        name: str = definition.__module__
        file = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
        if file is None:
            try:
                text = inspect.getsource(definition).encode()
            except (OSError, TypeError):  # as in a prompt: nobody knows its text, and could notice a change
                text = os.urandom(16)
            return cls(_place(definition), hashlib.sha256(text).hexdigest(), None)
        top = Path(file).absolute()
        package = top.stem == "__init__"
        text = b"".join(one.read_bytes() for one in (sorted(top.parent.rglob("*.py")) if package else [top]))
        folder = None if name == "__main__" else str(top.parents[package])
        return cls(_place(definition), hashlib.sha256(text).hexdigest(), folder)

    def __str__(self) -> str:
        return f"{self.place} {self.digest}"


class Registry(dict[str, T]):
    """The signals, methods or metrics (`kind`, for messages) by name, and the `sources` of those that are plugins.
    Raises UsageError when a name is looked up that nobody registers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.sources: dict[str, Source] = {}
        self._places: dict[str, str] = {}
        _REGISTRIES.append(self)

    def add(self, name: str, value: T, definition: Any) -> None:
        """Registers a value that comes from a function or class. If a module is reloaded, its new definition replaces
        the old one. Raises UsageError for a name that is taken or cannot be one."""
        place = _place(definition)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise UsageError(f"{self.kind} {name!r} ({place}): expected a name of letters, digits, '-' and '_'")
        taken = self._places.setdefault(name, place)
        if taken != place:
            raise UsageError(f"{self.kind} {name!r} ({place}): the name is taken by {taken}; choose another one")
        if not place.startswith("logo."):
            self.sources[name] = Source.of(definition)
        self[name] = value

    def __missing__(self, name: str) -> T:
        known = f"{closest(str(name), self)}; known: {', '.join(self)}"
        raise UsageError(f"unknown {self.kind} {name!r}{known}; one of a plugin needs --plugin (or {VARIABLE})")

    def source(self, name: str) -> str | None:
        """The definition and name of a plugin (one may have several), on which results depend; None for LoGo's own."""
        return f"{self.sources[name]} {name}" if name in self.sources else None


_REGISTRIES: list[Registry[Any]] = []
_LOADED: dict[str, None] = {}


def load(plugin: str, folder: str = "") -> None:
    """Imports the module of a plugin (`module:Object`), which registers what is in it; if it is not installed, from
    `folder`. Raises PluginError if it cannot be imported, or does not register the object."""
    module, _, name = plugin.partition(":")
    try:
        if folder and folder not in sys.path and importlib.util.find_spec(module.partition(".")[0]) is None:
            sys.path.append(folder)  # at the end, so that nothing there takes the place of what is installed
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(f"plugin {plugin!r}: expected an importable module:Object ({said})") from error
    if not any(_place(found) in registry._places.values() for registry in _REGISTRIES):
        raise PluginError(f"plugin {plugin!r}: expected an object under @logo.register_..., found {found!r:.60}")
    _LOADED[plugin] = None


def load_installed() -> None:
    """Imports the plugins that the environment and installed distributions name, unless that is done. Errors as `load`;
    UsageError if they are not named as they should be."""
    asked = [*_words(os.environ.get(VARIABLE, "")), *_installed()]
    for plugin, _, folder in (one.partition("@") for one in asked):
        if plugin not in _LOADED:
            load(plugin, folder)


def named() -> list[str]:
    """The plugins of this process, as `module:Object`, that have to be named with `--plugin` to repeat its run."""
    return [plugin for plugin in _LOADED if plugin not in _installed()]


def environment() -> dict[str, str]:
    """The environment in which another process finds the plugins of this one; empty without plugins."""
    sources = (source for registry in _REGISTRIES for source in registry.sources.values())
    found = dict.fromkeys(_words(os.environ.get(VARIABLE, "")))
    found |= dict.fromkeys(f"{source.place}@{source.folder}" for source in sources if source.folder is not None)
    return {VARIABLE: shlex.join(found)} if found else {}


def _installed() -> list[str]:
    return [entry.value for entry in importlib.metadata.entry_points(group="logo.plugins")]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{VARIABLE} {text!r}: expected module:Object, several with spaces ({error})") from None


def _place(definition: Any) -> str:
    return f"{getattr(definition, '__module__', '')}:{getattr(definition, '__qualname__', type(definition).__name__)}"
