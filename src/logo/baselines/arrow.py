"""`arrow` (arXiv 2405.11157): PEFT's router, which weights the adapters of a pool anew for every token and module."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from logo.adapters.activation import EVERYWHERE
from logo.adapters.layout import linear_modules
from logo.baselines.method import Prepared, Task, register_method, same_for_all
from logo.errors import UsageError, listed, need

if TYPE_CHECKING:
    from logo.engine import LoGo


@register_method(picks="pool")
def arrow(logo: LoGo, task: Task, *, top_k: int = 3, temperature: float = 1.0) -> Prepared:
    """A copy of the base model that routes by PEFT's `create_arrow_model`. In each adapted module, a token `h` gets the
    `top_k` adapters with the largest `|v · h|`, weighted by a softmax of these at `temperature`; `v` is the first right
    singular vector of the adapter's `B A` there.

    Raises:
        UsageError: the adapters differ in rank or modules, act on some tokens only, or the model runs in vLLM.
        MissingLibrary: without the extra `train`.
    """
    need("method 'arrow'", "peft")
    from peft import ArrowConfig, create_arrow_model

    from logo.engine import LoGo

    names = task.candidates(logo)
    later = [name for name in names if logo.pool[name].activation != EVERYWHERE]
    if later:
        raise UsageError(f"method 'arrow': expected adapters that act on every token, found {listed(later, 5)}")
    if any(weight.is_meta for weight in logo.model.parameters()):
        raise UsageError("method 'arrow' changes the model itself: use --engine local")
    engine = LoGo(copy.deepcopy(logo.model), logo.tokenizer, logo.pool.subset(names), settings=logo.settings)
    _check_alike(engine)
    config = ArrowConfig(top_k=min(top_k, len(names)), router_temperature=temperature, rng_seed=0)
    with tempfile.TemporaryDirectory() as folder:  # PEFT does not know all names of tensors that we read
        folders = [str(logo.save_mixture({name: 1.0}, Path(folder, str(i)))) for i, name in enumerate(names)]
        try:
            create_arrow_model(engine.model, folders, config).eval()
        except (ValueError, TypeError) as error:
            raise UsageError(f"method 'arrow': PEFT refuses this pool: {error}") from error
    return Prepared(same_for_all({}), engine=engine, routed=names)


def _check_alike(engine: LoGo) -> None:
    """Raises UsageError unless all adapters have one rank and change the same kinds of modules, in all layers."""
    shapes = {frozenset((path, module.rank) for path, module in adapter.modules.items()) for adapter in engine.fitted}
    adapted = {path for path, _ in next(iter(shapes))}
    kinds = {_kind(path) for path in adapted}
    of_these_kinds = {path for path, _ in linear_modules(engine.model) if _kind(path) in kinds}
    if len(shapes) > 1 or adapted != of_these_kinds:
        raise UsageError("method 'arrow': expected adapters with the same modules, in all layers, and one rank")


def _kind(path: str) -> str:
    """The last part of a module's path, such as `q_proj`."""
    return path.rpartition(".")[2]
