"""Which options a sweep may vary, and what a combination of their values means: a grid on the command line as cells.

An axis is an option of `logo eval run` under its own name, and reads its values as the option does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from logo.cli.belonging import (
    OF_MERGES,
    OF_METHODS,
    check_method_options,
    check_selection_options,
    merges_that_may_read,
)
from logo.cli.methods import MethodOptions, make_method
from logo.cli.opening import selection_settings
from logo.cli.options import OFFICIAL_SIGNAL, EngineOptions
from logo.errors import LoGoError, UsageError, closest

if TYPE_CHECKING:
    from logo.baselines import Method
    from logo.evaluation.sweep.grid import Axis, Value
    from logo.evaluation.sweep.running import Cell
    from logo.selection.settings import SelectionSettings

DEFAULT = "default"  # the value that stands for the option's default


def _fields(names: str) -> dict[str, str]:
    """Axis -> field of the options, from names of fields separated by blanks."""
    return {name.replace("_", "-"): name for name in names.split()}


# Fields of EngineOptions and of MethodOptions.
SELECTION = {
    "k": "n_selected_modules",
    **_fields("signal weighting when_unsure unsure_below examples"),
}
METHODS = _fields(
    "method merge merge_density merge_sign arrow_top_k arrow_temperature shots lorahub_budget retriever_variant "
    "samples_per_adapter"
)
SEED = "seed"
AXES = (*SELECTION, *METHODS, SEED)

_ALIASES = {"n-selected-modules": "k", "selection-strategy": "signal"}


@dataclass(frozen=True)
class Common:
    """The options of all cells, unless the grid varies them."""

    engine: EngineOptions
    method: MethodOptions
    seed: int

    def at(self, values: Mapping[str, Value]) -> Common:
        """The options with these values of axes."""
        engine = {SELECTION[axis]: _option(axis, value) for axis, value in values.items() if axis in SELECTION}
        method = {METHODS[axis]: _option(axis, value) for axis, value in values.items() if axis in METHODS}
        seed = int(values.get(SEED, self.seed))
        return Common(replace(self.engine, **engine), replace(self.method, **method), seed)

    def parts(self) -> tuple[SelectionSettings, Method]:
        """The settings and the method that the options describe.

        Raises:
            UsageError: they cannot be used, or not together.
        """
        method = _method(self.method, self.engine.n_selected_modules, self.seed)
        return selection_settings(self.engine), method


@dataclass(frozen=True)
class Skipped:
    """A combination of values that cannot be used, and why."""

    values: Mapping[str, Value]
    reason: str


def read_grid(texts: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of `--grid AXIS=VALUES ...`, every value read as the option reads it.

    Raises:
        UsageError: an axis or a value that does not exist, or one that is there twice.
    """
    from logo.evaluation.sweep.grid import Axis, split

    axes: list[Axis] = []
    for text in texts:
        name, values = split(text)
        name = _ALIASES.get(name, name)
        if name not in AXES:
            raise UsageError(f"grid {text!r}: no axis {name!r}{closest(name, AXES)}; known: {', '.join(AXES)}")
        if name in (axis.name for axis in axes):
            raise UsageError(f"grid: axis {name!r} is given twice; give all of its values at once")
        axes.append(Axis(name, tuple(_value(name, value) for value in values)))
    if not axes:
        raise UsageError("grid: expected at least one axis, such as --grid k=1,3,20")
    return tuple(axes)


def make_cells(axes: Sequence[Axis], common: Common) -> tuple[list[Cell], list[Skipped]]:
    """The cells of a grid, and the combinations that cannot be used.

    Raises:
        UsageError: a value that no combination can use, or no cell is left.
        DataError: the samples that a method needs cannot be used.
    """
    from logo.evaluation.sweep.grid import product

    for axis in axes:
        for value in axis.values:
            _check_alone(axis.name, value, common)
    cells, skipped = [], []
    for values in product(axes):
        try:
            cells.append(_cell(values, common))
        except UsageError as error:
            skipped.append(Skipped(values, str(error)))
    if not cells:
        raise UsageError(f"grid: none of the combinations ({len(skipped)}) is possible; the first: {skipped[0].reason}")
    check_selection_options([cell.settings for cell in cells])
    methods = [_method(common.at(cell.values).method, None, cell.seed) for cell in cells]
    check_method_options(methods)
    return cells, skipped


def _cell(values: Mapping[str, Value], common: Common) -> Cell:
    from logo.evaluation.results import LOGO
    from logo.evaluation.sweep.running import Cell

    here = common.at(values)
    method = _method(here.method, here.engine.n_selected_modules, here.seed)
    moot = frozenset(axis for axis in values if _is_moot(axis, here, method))
    # Cells that share a run must have one identity, so values of moot axes are replaced by the common ones.
    here = common.at({axis: value for axis, value in values.items() if axis not in moot})
    settings, method = here.parts()
    options = {name: value for name, value in asdict(here.engine).items() if name != "base_model"}  # the same in all
    return Cell(
        values,
        settings,
        None if method.label == LOGO else method,
        here.seed,
        moot,
        {**options, SEED: here.seed, "method": method.label, "merge": method.merging.kind},
    )


def _is_moot(axis: str, here: Common, method: Method) -> bool:
    """Whether a cell certainly does not depend on an axis."""
    from logo.baselines.registry import may_select_by_signal

    own = {field.name for field in fields(method)}
    option = METHODS.get(axis, "")
    if option in OF_MERGES:
        return method.merging.kind not in merges_that_may_read(option)
    if option in OF_METHODS:
        return not own & set(OF_METHODS[option])
    if axis == "k":
        return not may_select_by_signal(method) and "k" not in own
    if axis not in SELECTION:
        return False
    if not may_select_by_signal(method):
        return True
    if axis == "unsure-below":
        return here.engine.when_unsure == "mix"
    return False


def _check_alone(axis: str, value: Value, common: Common) -> None:
    """Raises LoGoError for a value that is a mistake by itself, whatever values it is combined with."""
    from logo.selection.signals import SIGNALS, get_signal

    if axis == "signal":
        get_signal(str(value))
        return
    if axis == "method":
        _method(replace(common.method, method=str(value), merge=None), common.engine.n_selected_modules, common.seed)
        return
    plain = Common(EngineOptions(), MethodOptions(), 0)
    if axis in SELECTION:
        reasons = []
        for name in SIGNALS:
            try:
                selection_settings(replace(plain.at({axis: value}).engine, signal=name))
                return
            except LoGoError as error:
                reasons.append(str(error))
        raise UsageError(f"grid {axis}={value}: {reasons[0]}")
    for method in ("logo", "best-single", "lorahub"):
        try:
            plain.at({axis: value, "method": method}).parts()
        except UsageError as error:
            raise UsageError(f"grid {axis}={value}: {error}") from None


@functools.lru_cache(maxsize=8)
def _method(options: MethodOptions, k: int | None, seed: int) -> Method:
    """The method that the options describe; cached, because some methods read a folder of samples."""
    return make_method(options, k=k, seed=seed)


def _value(axis: str, text: str) -> Value:
    """A value of an axis as tables show it: a number or a text."""
    if axis == SEED:
        seed = _number(axis, text, int)
        if seed < 0:
            raise UsageError(f"grid {axis}: expected 0 or more, found {seed}")
        return seed
    kind, default = _kind(axis)
    if text == DEFAULT:
        usual = OFFICIAL_SIGNAL if axis == "signal" else default
        return DEFAULT if usual is None else usual
    if known := get_args(kind):
        if text not in known:
            raise UsageError(
                f"grid {axis}: no value {text!r}{closest(text, known)}; known: {', '.join([*known, DEFAULT])}"
            )
        return text
    return text if kind is str else _number(axis, text, int if kind is int else float)


def _number(axis: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"grid {axis}: expected {what}, found {text!r}") from None


def _option(axis: str, value: Value) -> Any:
    """A value of an axis in the type of the option's field."""
    if value == DEFAULT and _kind(axis)[1] is None:
        return None
    return value


def _kind(axis: str) -> tuple[Any, Any]:
    """Type and default of an axis's option."""
    group: type[Any] = EngineOptions if axis in SELECTION else MethodOptions
    name = SELECTION.get(axis) or METHODS[axis]
    hint = get_type_hints(group)[name]
    either = get_args(hint) if NoneType in get_args(hint) else (hint,)
    kinds = [kind for kind in either if kind is not NoneType]
    return kinds[0], next(field.default for field in fields(group) if field.name == name)
