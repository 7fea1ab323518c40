"""Plugins: signals, methods, metrics and merges of others beside ours, by name.

    a name -> what is registered in this process -> modules that LOGO_PLUGINS names -> entry points of distributions

Each kind has one `Registry`, and a module adds to it when it is imported, by `logo.register_signal` and its like. Code
of others is imported only when a name is asked for that is not known yet, or when a user names a module (`--plugin`).
Processes that this one starts find the same plugins through their environment.
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
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from logo.errors import LoGoError, PluginError, UsageError, closest, is_out_of_memory

T = TypeVar("T")

VARIABLE = "LOGO_PLUGINS"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_PLACE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@contextmanager
def running(plugin: str) -> Iterator[None]:
    """Runs code of a plugin in the block, and names the plugin if it fails.

    Args:
        plugin: its kind and name, for the message.

    Raises:
        RuntimeError: the plugin has failed. Errors of LoGo and missing memory, which others deal with, stay as they
            are.
    """
    try:
        yield
    except LoGoError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(f"{plugin} failed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Source:
    """Where a plugin is defined.

    Attributes:
        place: `module:Object`.
        digest: SHA-256 in hex of its top-level package, or of its one file, when it was registered.
        folder: the module is imported from there; None where no other process can import it, as from a notebook.
    """

    place: str
    digest: str
    folder: str | None

    @classmethod
    def of(cls, definition: Any) -> Source:
        """The source of a function or class."""
        name = definition.__module__
        file = getattr(sys.modules.get(name), "__file__", None)
        folder = None
        if file is not None and name != "__main__":
            folder = str(Path(file).absolute().parents[name.count(".") + (Path(file).stem == "__init__")])
        return cls(_place(definition), _digest(definition, file), folder)

    def __str__(self) -> str:
        return f"{self.place} {self.digest}"


class Registry(dict[str, T]):
    """The signals, methods, metrics or merges, by name. Looking a name up imports the plugin that registers it.

    Args:
        kind: a word for messages; entry points are in the group `logo.<kind>s`.
        others: names that cannot be registered, since they mean something already.

    Raises:
        UsageError: when a name is looked up that nobody registers.
        PluginError: when the plugin that should register it cannot be imported, or does not.
    """

    def __init__(self, kind: str, others: Iterable[str] = ()) -> None:
        super().__init__()
        self.kind, self.group = kind, f"logo.{kind}s"
        self.sources: dict[str, Source] = {}  # of plugins
        self._others = tuple(others)
        self._places: dict[str, str] = {}
        _REGISTRIES.append(self)

    def add(self, name: str, value: T, definition: Any) -> None:
        """Registers a value. If a module is reloaded, its new definition replaces the old one of the same name.

        Args:
            definition: the function or class that the value comes from.

        Raises:
            UsageError: the name is taken, or cannot be one.
        """
        place = _place(definition)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"{self.kind} {name!r} ({place}): expected a name of letters, digits, '-' and '_'")
        taken = self._places.get(name, "logo itself" if name in self._others else place)
        if taken != place:
            raise UsageError(f"{self.kind} {name!r} ({place}): the name is taken by {taken}; choose another one")
        if not place.startswith("logo."):
            self.sources[name] = Source.of(definition)
        self._places[name] = place
        self[name] = value

    def __missing__(self, name: str) -> T:
        _load_named(os.environ.get(VARIABLE, ""))
        if name not in self:
            self._load_installed(name)
        if name not in self:
            known = self.known
            raise UsageError(
                f"unknown {self.kind} {name!r}{closest(str(name), known)}; known: {', '.join(known)}; one of a plugin "
                f"needs --plugin (or {VARIABLE})"
            )
        return self[name]

    @property
    def known(self) -> tuple[str, ...]:
        """All names, also of plugins that are installed and not imported."""
        return tuple(dict.fromkeys([*self, *self._others, *(found.name for found in self._installed())]))

    def source(self, name: str) -> str | None:
        """The module, object and digest of a plugin, on which results depend; None for LoGo's own."""
        return str(self.sources[name]) if name in self.sources else None

    def registers(self, definition: Any) -> bool:
        """Whether a function or class is registered."""
        return _place(definition) in self._places.values()

    def installed(self, name: str) -> bool:
        """Whether an installed distribution registers this name."""
        return any(found.name == name for found in self._installed())

    def _installed(self) -> Sequence[importlib.metadata.EntryPoint]:
        return tuple(importlib.metadata.entry_points(group=self.group))

    def _load_installed(self, name: str) -> None:
        found = {(_distribution(one), one.value): one for one in self._installed() if one.name == name}
        if len(found) > 1:
            both = " and ".join(f"{distribution} ({value})" for distribution, value in found)
            raise PluginError(f"{self.kind} {name!r}: two plugins have this name, {both}; uninstall one of them")
        for (distribution, value), one in found.items():
            said = f"{self.kind} {name!r} of the plugin {distribution}: {value}"
            try:
                one.load()
            except Exception as error:
                raise PluginError(f"{said} cannot be imported ({_told(error)}); fix or uninstall it") from error
            if name not in self:
                raise PluginError(f"{said} registers no {self.kind} {name!r}: use @logo.register_{self.kind} there")


_REGISTRIES: list[Registry[Any]] = []


def load(plugin: str, folder: str = "") -> None:
    """Imports the module of a plugin, which registers what is in it.

    Args:
        plugin: `module:Object`.
        folder: where the module may be, if it is not installed.

    Raises:
        UsageError: this is no `module:Object`.
        PluginError: the module cannot be imported, or does not register the object.
    """
    if not _PLACE.fullmatch(plugin):
        raise UsageError(f"plugin {plugin!r}: expected module:Object, such as my_signals:quiet")
    module, _, name = plugin.partition(":")
    if folder and folder not in sys.path and importlib.util.find_spec(module.partition(".")[0]) is None:
        sys.path.append(folder)  # at the end, so that nothing there takes the place of what is installed
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raise PluginError(f"plugin {plugin!r} cannot be imported ({_told(error)})") from error
    if not any(registry.registers(found) for registry in _REGISTRIES):
        decorators = ", ".join(f"@logo.register_{kind}" for kind in ("signal", "method", "metric", "merge"))
        raise PluginError(f"plugin {plugin!r}: expected an object under one of {decorators}, found {found!r:.60}")


@functools.lru_cache(maxsize=8)  # again only where the variable has changed, or something could not be imported
def _load_named(text: str) -> None:
    for one in _words(text):
        plugin, _, folder = one.partition("@")
        load(plugin, folder)


def named() -> list[str]:
    """The plugins of this process, as `module:Object`, that have to be named with `--plugin` to repeat its run.

    Installed plugins are found without being named, and plugins of a notebook cannot be imported elsewhere.
    """
    sources = (
        source
        for registry in _REGISTRIES
        for name, source in registry.sources.items()
        if source.folder is not None and not registry.installed(name)
    )
    return list(dict.fromkeys(source.place for source in sources))


def environment() -> dict[str, str]:
    """The environment in which another process finds the plugins of this one: `LOGO_PLUGINS`, a list of `module:Object`
    or `module:Object@folder` that is quoted as for a shell; empty without plugins."""
    known = _words(os.environ.get(VARIABLE, ""))
    sources = (source for registry in _REGISTRIES for source in registry.sources.values())
    known += (f"{source.place}@{source.folder}" for source in sources if source.folder is not None)
    return {VARIABLE: shlex.join(dict.fromkeys(known))} if known else {}


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"{VARIABLE} {text!r}: expected module:Object, several separated by spaces ({error}); fix the quotes"
        ) from None


def _place(definition: Any) -> str:
    kind = type(definition)
    return f"{getattr(definition, '__module__', kind.__module__)}:{getattr(definition, '__qualname__', repr(kind))}"


def _digest(definition: Any, file: str | None) -> str:
    top = getattr(sys.modules.get(definition.__module__.partition(".")[0]), "__file__", None) or file
    try:
        if top is None:
            return hashlib.sha256(inspect.getsource(definition).encode()).hexdigest()
        folder = Path(top).parent
        files = sorted(folder.rglob("*.py")) if Path(top).stem == "__init__" else [Path(top)]
        digest = hashlib.sha256()
        for one in files:
            digest.update(str(one.relative_to(folder)).encode() + b"\0" + hashlib.sha256(one.read_bytes()).digest())
        return digest.hexdigest()
    except (OSError, TypeError):  # without a digest, a change could not be noticed
        return uuid.uuid4().hex


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return "of unknown origin" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
