"""Options in files: `--config FILE`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from logo import plugins
from logo.errors import DataError, StorageError, UsageError, closest


def command_name(context: typer.Context) -> str:
    """The command's name, as the user types it after `logo`."""
    return context.command_path.partition(" ")[2]


def _configured(context: typer.Context, file: Path | None) -> None:
    if file is not None and not context.resilient_parsing:
        context.default_map = _values(context, _read(context, file), f"--config {file}")


def _read(context: typer.Context, file: Path) -> Mapping[str, Any]:
    """The options in a file, which a user or a run wrote, by name."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--config {file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise DataError(f"--config {file}: expected YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"--config {file}: expected options by name, found {type(content).__name__}")
    options = content.get("options")
    command = content.get("command") or (options.get("command") if isinstance(options, dict) else None)
    if not isinstance(command, dict):
        return content
    name, here = str(command.get("name")), command_name(context)
    if name.replace("evaluate", "eval run") != here.replace("evaluate", "eval run"):
        raise UsageError(f"--config {file}: `logo {name}` wrote it; expected a file for `logo {here}`")
    for one in command.get("plugins") or ():
        if one not in plugins.named():
            raise UsageError(f"--config {file}: its run used the plugin {one}, which is not loaded; add --plugin {one}")
    found = command.get("options")
    if not isinstance(found, dict):
        raise DataError(f"--config {file}: expected the command's options by name, found {type(found).__name__}")
    # The permission to replace results was for that one command, perhaps with other options.
    return {key: value for key, value in found.items() if key != "overwrite"}


def _values(context: typer.Context, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values by the parameters' names, as texts that the options parse.

    Raises:
        UsageError: there is no such option.
    """
    named: dict[str, Any] = {}
    for parameter in context.command.params:
        if parameter.name not in ("config", "help"):
            every = (str(parameter.name), *parameter.opts)
            named |= {name.lstrip("-").replace("-", "_"): parameter for name in every}
    found: dict[str, Any] = {}
    for name, value in options.items():
        key = str(name).lstrip("-").replace("-", "_")
        if key not in named:
            hint = closest(key, [known for known in named if len(known) > 1])
            raise UsageError(f"{where}: no option {str(name)!r}{hint}; `{context.command_path} --help` shows all")
        if value is not None:
            found[str(named[key].name)] = _as_typed(named[key], value)
    return found


def _as_typed(parameter: Any, value: Any) -> Any:
    """A value as it would be written on the command line."""
    if parameter.nargs == 1 and not getattr(parameter, "multiple", False):
        return ",".join(map(_word, value)) if isinstance(value, list) else _word(value)
    if isinstance(value, list):
        return [_word(one) for one in value]
    return _word(value).split() if parameter.nargs > 1 else [_word(value)]


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Options by name, in YAML or as a run wrote them.",
        callback=_configured,
        metavar="FILE",
        is_eager=True,  # read before the options that it sets
        show_default=False,
    ),
]
