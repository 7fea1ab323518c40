"""`--config FILE`: the options of a command from a file that a user or a run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App
from cyclopts.config import Dict

from logo import plugins
from logo.errors import DataError, StorageError, UsageError


def options_in(file: Path, names: Sequence[str], command: App) -> Dict:
    """The options in a file, for cyclopts.

    Args:
        names: of the groups and the command that run, such as `("eval", "run")`.
        command: the command itself.

    Raises:
        StorageError, DataError: the file cannot be read, or holds something else.
        UsageError: another command wrote it, its plugins are not loaded, or it names one option twice.
    """
    content = _content(file)
    record = content.get("command") if isinstance(content, dict) else None
    if isinstance(record, dict):  # a run wrote it
        _check_command(file, record, names)
        content = record.get("options")
    if not isinstance(content, dict):
        raise DataError(f"--config {file}: expected options by name, found {type(content).__name__}")
    options = {name: value for name, value in content.items() if value is not None}
    if isinstance(record, dict):
        options.pop("overwrite", None)  # the permission to replace results was for that one command
    options = _by_first_name(file, options, command)
    for name in reversed(names):  # below its command, an option may be called as another command is
        options = {name: options}
    return Dict(options, source=f"--config {file}")


def _content(file: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--config {file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise DataError(f"--config {file}: expected YAML or JSON: {' '.join(str(error).split())}") from error


def _check_command(file: Path, record: dict[str, Any], names: Sequence[str]) -> None:
    """Raises UsageError unless a run of this command, with plugins that are loaded now, wrote the record."""
    here = " ".join(names)
    if record.get("name") != here:
        raise UsageError(f"--config {file}: `logo {record.get('name')}` wrote it; expected a file for `logo {here}`")
    for plugin in record.get("plugins") or ():
        if plugin not in plugins.named():
            raise UsageError(f"--config {file}: its run used the plugin {plugin}; add --plugin {plugin}")


def _in_file(name: str) -> str:
    """The name of an option as files have it."""
    return name.lstrip("-").replace("-", "_")


def _by_first_name(file: Path, options: dict[str, Any], command: App) -> dict[str, Any]:
    """The options by the first of their names, `n_selected_modules: 2` for `k: 2`."""
    if command.default_command is None:  # a group of commands
        return options
    first_names: dict[str, str] = {}
    for argument in command.assemble_argument_collection():
        for name in argument.names:
            first_names[_in_file(name)] = _in_file(argument.name)
    named: dict[str, str] = {}  # first name -> the one in the file
    for name in map(str, options):
        first_name = first_names.get(_in_file(name), _in_file(name))
        if first_name in named:
            raise UsageError(f"--config {file}: {named[first_name]} and {name} are the same option; keep one of them")
        named[first_name] = name
    return dict(zip(named, options.values(), strict=True))
