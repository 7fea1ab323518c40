"""`logo eval lm-eval`: lm-evaluation-harness's own command line, with LoGo among its models."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from logo.errors import need

MODEL = "logo"
_SUBCOMMANDS = frozenset({"run", "ls", "validate"})
_NAMES_A_MODEL = ("--model", "-M", "--config", "-C")


def lm_eval(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Run lm-evaluation-harness with `--model logo`: one selection per document, for any task.

    `--model_args` are `base_model=..., adapters=..., k=..., signal=...` and all other settings of selection.

    Example: logo eval lm-eval --model_args base_model=demo --tasks my_task --include_path tasks --batch_size 8

    Args:
        arguments: Arguments of `lm_eval`; `logo eval lm-eval run --help` shows them.
    """
    need("this command", "lm_eval")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="logo.evaluation.harness:LoGoLM")
    before = sys.argv
    sys.argv = ["lm_eval", *completed(list(arguments))]  # from which the harness reads its arguments
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def completed(arguments: list[str]) -> list[str]:
    """The harness's arguments with `--model logo` where they run something and name no model."""
    names_a_command = bool(arguments) and arguments[0] in _SUBCOMMANDS
    command = arguments[0] if names_a_command else "run"
    options = arguments[1:] if names_a_command else arguments
    if command != "run" or not options or "--help" in options or "-h" in options:
        return arguments
    if any(option.split("=")[0] in _NAMES_A_MODEL for option in options):
        return [command, *options]
    return [command, "--model", MODEL, *options]
