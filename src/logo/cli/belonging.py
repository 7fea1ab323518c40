"""Refuses options that only other methods or signals read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

from logo.cli.expanded import given
from logo.errors import UsageError

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.selection.settings import SelectionSettings
    from logo.selection.signals import Signal

# Option: the fields of a method that read it.
OF_METHODS: dict[str, tuple[str, ...]] = {
    "shots": ("rows",),
    "lorahub_budget": ("budget",),
    "retriever_variant": ("variant",),
    "adapter_samples": ("samples",),
    "samples_per_adapter": ("samples",),
    "embedding_model": ("embedding_model",),
    "embedding_instruction": ("instruction",),
}
# Options of the engine's own selection, which the other methods replace.
OF_SELECTION = {
    *("signal", "calibration_prompts", "examples", "probe_context", "probe_text", "window"),
    *("weighting", "when_unsure", "unsure_below"),
}
K = "n_selected_modules"  # which some of the other methods read too


def check_method_options(methods: Sequence[Method], *, selects: bool = False) -> None:
    """Refuses options that the user gave and none of the methods reads.

    What a plugin's method reads of the engine's selection is not known, so these options are left to it. `--train-rows`
    says where data is, and is allowed beside any method.

    Args:
        selects: whether signals select beside the methods.

    Raises:
        UsageError: there is one.
    """
    from logo.baselines.fixed import OwnSelector
    from logo.baselines.registry import METHODS, may_select_by_signal

    own = {field.name for method in methods for field in fields(method)}
    chosen = ", ".join(dict.fromkeys(method.name for method in methods)) or OwnSelector.name
    selects = selects or any(may_select_by_signal(method) for method in methods)
    for option in given():
        readers = ("k",) if option == K else OF_METHODS.get(option, ())
        named = [name for name, kind in METHODS.items() if {field.name for field in fields(kind)} & set(readers)]
        if option == K or option in OF_SELECTION:
            named = [OwnSelector.name, *named]
        if named and not (own & set(readers) or (selects and OwnSelector.name in named)):
            _refuse(option, "method", named, f"the method is {chosen}")


def check_forced_options() -> None:
    """Refuses options that configure selection, for a command whose adapters are forced and not selected.

    Raises:
        UsageError: one of them configures selection.
    """
    for option in sorted({*OF_SELECTION, K} & given()):
        flag = "-k" if option == K else f"--{option.replace('_', '-')}"
        raise UsageError(
            f"{flag} configures how adapters are selected, but --adapter or --base-only says which ones answer: leave "
            "out one of the two"
        )


def check_selection_options(settings: Sequence[SelectionSettings]) -> None:
    """Refuses options of selection that the user gave and none of these settings looks at.

    Raises:
        UsageError: there is one.
    """
    from logo.selection.signals import SIGNALS

    looks_at: dict[str, Callable[[Signal], bool]] = {
        "calibration_prompts": lambda signal: signal.scale != "raw",
        "examples": lambda signal: signal.scale == "whitened",
    }
    signals = ", ".join(dict.fromkeys(one.signal for one in settings))
    for option, looks in looks_at.items():
        if option in given() and not any(looks(one.reading()) for one in settings):
            named = [name for name, signal in SIGNALS.items() if looks(signal)]
            _refuse(option, "signal", named, f"the signal is {signals}")


def _refuse(option: str, what: str, belongs: Iterable[str], found: str) -> NoReturn:
    raise UsageError(
        f"--{option.replace('_', '-')} is only for --{what} {', '.join(belongs)}, but {found}; leave it out"
    )
