"""Makes options of dataclass fields, and records which options a user gave, for the files that runs write."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import Field, fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_origin

import typer

from logo import plugins
from logo.cli.config import CONFIG, command_name
from logo.cli.options import OFFICIAL
from logo.recorded import without_secrets

_F = TypeVar("_F", bound=Callable[..., Any])
_CONTEXT = "typer_context"
_SOURCES = frozenset({"COMMANDLINE", "DEFAULT_MAP"})

_given: ContextVar[dict[str, Any]] = ContextVar("given")


def command_line() -> dict[str, Any]:
    """The command that runs and the options that it was given, as `--config` reads them back."""
    return dict(_given.get({"name": "", "options": {}}))


def given() -> frozenset[str]:
    """The names of the options that the user gave."""
    return frozenset(command_line()["options"])


def declared(command: _F) -> _F:
    """Gives a command without groups of options the signature that Typer reads its options from."""
    hints = inspect.get_annotations(command, eval_str=True)
    own = inspect.signature(command).parameters.values()
    return _signed(command, [_parameter(p.name, hints[p.name], p.default) for p in own])


def expanded(command: _F, *, official: bool = False, defaults: Mapping[str, str] = MappingProxyType({})) -> _F:
    """Gives a command one option for every field of its dataclass parameters, and `--config`.

    Args:
        official: whether options have the names that they have in the official script.
        defaults: what the help shows as the default of an option, where this command has one of its own.
    """
    hints = inspect.get_annotations(command, eval_str=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    own_context = next((name for name, hint in hints.items() if hint is typer.Context), None)
    own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
    parameters = [_parameter(p.name, hints[p.name], p.default) for p in own]
    for group in groups.values():
        of_fields, words = _hints(group), _words(group)
        parameters += [
            _parameter(f.name, of_fields[f.name], f, official, defaults, words.get(f.name)) for f in fields(group)
        ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        values.pop("config")
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

    parameters.append(_parameter("config", CONFIG, None))
    if own_context is None:
        parameters.append(_parameter(_CONTEXT, typer.Context, inspect.Parameter.empty))
    return _signed(wrapper, parameters)  # type: ignore[return-value]


def _signed(command: _F, parameters: Sequence[inspect.Parameter]) -> _F:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _hints(group: type) -> dict[str, Any]:
    """The annotations of a dataclass and its parents. Python 3.10's `get_type_hints` hides `Annotated` in an `Optional`
    where the default is None, and Typer would then take an argument for an option."""
    found: dict[str, Any] = {}
    for kind in reversed(group.__mro__):
        found |= inspect.get_annotations(kind, eval_str=True)
    return found


def _words(group: type) -> dict[str, str]:
    """Field -> the docstring below it, which a dataclass of the library has instead of an option."""
    [made] = ast.parse(inspect.cleandoc(inspect.getsource(group))).body
    body = made.body if isinstance(made, ast.ClassDef) else []
    return {
        ast.unparse(above.target): ast.literal_eval(below.value)
        for above, below in itertools.pairwise(body)
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _parameter(
    name: str,
    hint: Any,
    of: Any,
    official: bool = False,
    defaults: Mapping[str, str] = MappingProxyType({}),
    words: str | None = None,
) -> inspect.Parameter:
    """A parameter for Typer.

    Args:
        of: a field, or the default of a parameter, which is a field if the option is not in the annotation.
        official, defaults: as `expanded`.
        words: what the help says of a field without an option.
    """
    default, metadata = (of.default, of.metadata) if isinstance(of, Field) else (of, {})
    option = metadata.get("option")
    if option is None and words is not None:
        option = typer.Option(..., help=words, show_default="none" if default is None else True)
    if option is None and get_origin(hint) is Annotated:
        hint, option = hint.__origin__, hint.__metadata__[0]
    if option is not None:
        option = copy.copy(option)
        option.show_default = defaults.get(name, option.show_default)
        if default is False and not option.param_decls:
            option.param_decls = (f"--{name.replace('_', '-')}",)
        if official and name in OFFICIAL:
            option.param_decls, metavar, text = OFFICIAL[name]
            option.metavar, option.help = metavar or option.metavar, text or option.help
        hint = Annotated[list[str] | None if metadata.get("repeated") else hint, option]
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _joined(of: Field[Any], value: Any) -> Any:
    if not of.metadata.get("repeated"):
        return value
    return ",".join(value) if value else None


def _what_was_given(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The command, the options that the user gave it, and the plugins, as `--config` reads them back."""
    found = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name in _SOURCES:
            found[name] = _plain(value)
    made = {"name": command_name(context), "options": without_secrets(found)}
    return {**made, "plugins": named} if (named := plugins.named()) else made


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)
