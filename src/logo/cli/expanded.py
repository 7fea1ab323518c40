"""Makes options of dataclass fields, and records which options a user gave, for the files that runs write."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import Field, fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import typer

from logo import plugins
from logo.cli.config import EVERYWHERE, command_name
from logo.cli.renamed import OFFICIAL

_F = TypeVar("_F", bound=Callable[..., Any])
_CONTEXT = "typer_context"
_SOURCES = frozenset({"COMMANDLINE", "DEFAULT_MAP"})
_SECRET = frozenset({"api_key", "token"})

_given: ContextVar[dict[str, Any]] = ContextVar("given")


def command_line() -> dict[str, Any]:
    """The command that runs and the options that it was given, as `--config` reads them back."""
    return dict(_given.get({"name": "", "options": {}}))


def given() -> frozenset[str]:
    """The names of the options that the user gave."""
    return frozenset(command_line()["options"])


def expanded(command: _F, *, official: bool = False, defaults: Mapping[str, str] = MappingProxyType({})) -> _F:
    """Gives a command one option for every field of its dataclass parameters, and those that every such command has.

    Args:
        official: whether options have the names that they have in the official script.
        defaults: what the help shows as the default of an option, where this command has one of its own.
    """
    hints = inspect.get_annotations(command, eval_str=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    own_context = next((name for name, hint in hints.items() if hint is typer.Context), None)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        field_hints = _hints(groups[name])
        parameters += [
            _keyword(f.name, _annotation(f, field_hints[f.name], official, defaults), f.default)
            for f in fields(groups[name])
        ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        for name in EVERYWHERE:
            values.pop(name)
        context = values.pop(_CONTEXT) if own_context is None else values.pop(own_context)
        token = _given.set(_what_was_given(context, values))
        made = {
            name: group(**{f.name: _joined(f, values.pop(f.name)) for f in fields(group)})
            for name, group in groups.items()
        }
        try:
            return command(**values, **made, **({} if own_context is None else {own_context: context}))
        finally:
            _given.reset(token)

    parameters += [_keyword(name, annotation, None) for name, annotation in EVERYWHERE.items()]
    parameters.sort(key=lambda p: p.kind)
    if own_context is None:
        parameters.append(_keyword(_CONTEXT, typer.Context, inspect.Parameter.empty))
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper  # type: ignore[return-value]


def _hints(group: type) -> dict[str, Any]:
    """The annotations of a dataclass and its parents. Python 3.10's `get_type_hints` hides `Annotated` in an `Optional`
    where the default is None, and Typer would then take an argument for an option."""
    found: dict[str, Any] = {}
    for kind in reversed(group.__mro__):
        found |= inspect.get_annotations(kind, eval_str=True)
    return found


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(of: Field[Any], hint: Any, official: bool, defaults: Mapping[str, str]) -> Any:
    kind, option = hint.__origin__, copy.copy(hint.__metadata__[0])
    option.show_default = defaults.get(of.name, option.show_default)
    if official and of.name in OFFICIAL:
        option.param_decls, metavar, text = OFFICIAL[of.name]
        option.metavar, option.help = metavar or option.metavar, text or option.help
    return Annotated[list[str] | None if of.metadata.get("repeated") else kind, option]


def _joined(of: Field[Any], value: Any) -> Any:
    if not of.metadata.get("repeated"):
        return value
    return ",".join(value) if value else None


def _what_was_given(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The command, the options that the user gave it, and the plugins, as `--config` reads them back."""
    found = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name in _SOURCES and name not in _SECRET:
            found[name] = _plain(value)
    made = {"name": command_name(context), "options": found}
    return {**made, "plugins": named} if (named := plugins.named()) else made


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)
