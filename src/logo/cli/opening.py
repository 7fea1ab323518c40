"""What the options describe: a base model with its pool, and the engine on them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logo.adapters.pool import AdapterPool
from logo.cli.options import EngineOptions, ModelOptions, ProbeText, SelectionOptions
from logo.cli.output import err, note, progress
from logo.files import cache_folder
from logo.models import load_base, load_config, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from logo.engine import LoGo
    from logo.selection.settings import SelectionSettings

MODEL_DIR = "./hf_models"  # the official script's folder of base models, which is searched first
DEFAULT_SIGNAL = "calibrated"
QUIET = 20.0  # seconds after which a command without a terminal says what it waits for


def open_pool(options: ModelOptions, base_model: str, allow_pickle: bool = False) -> AdapterPool:
    """The pool that the options name, or the base model's own."""
    from logo.adapters import pool as pools

    return pools.open_pool(options.sources, base_model, MODEL_DIR, allow_pickle=allow_pickle)


def selection_settings(options: ModelOptions, probe_text: ProbeText | None = None) -> SelectionSettings:
    """The settings of probe and selection, the usual ones if the options have none; raises for values that cannot be
    used, before a model is loaded."""
    from logo.selection.settings import SelectionSettings

    if not isinstance(options, EngineOptions):
        return SelectionSettings()
    return SelectionSettings(
        signal=options.signal or DEFAULT_SIGNAL,
        k=options.n_selected_modules,
        when_unsure=options.when_unsure,
        prior=options.prior,
        encoder=options.encoder,
        probe_text=probe_text,
    )


def check_encoder(options: EngineOptions) -> None:
    """Loads the text encoder, if there is one, so that one that cannot be loaded is refused before anything starts."""
    if options.encoder is not None:
        from logo.selection.encoder import load_encoder

        load_encoder(options.encoder)


@dataclass(frozen=True)
class Opened:
    """A loaded base model and a pool, for any number of engines."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: AdapterPool

    def engine(self, settings: SelectionSettings, **options: Any) -> LoGo:
        """An engine with these settings and `options` of `LoGo`, on the calibrated pool."""
        from logo.engine import LoGo

        logo = LoGo(self.model, self.tokenizer, self.pool, settings=settings, **options)
        cache = cache_folder(settings.cache)
        where = f"once; kept in {cache}" if cache else "each time, since there is no cache folder"
        late_note = threading.Timer(QUIET, note, [f"calibrating the pool ({where}) ..."])
        late_note.daemon = True
        with progress(disable=not err.is_terminal) as bars:
            bar = bars.add_task("calibrating", total=None, visible=False)
            if not err.is_terminal:
                late_note.start()
            try:
                logo.calibrate(tell=lambda done, total: bars.update(bar, total=total, completed=done, visible=True))
            finally:
                late_note.cancel()
        return logo


def open_base(options: ModelOptions, base_model: str, allow_pickle: bool = False) -> Opened:
    """Opens the pool and loads the base model."""
    quiet_transformers()
    load_config(base_model, model_dir=MODEL_DIR)  # may it be read?
    pool = open_pool(options, base_model, allow_pickle)
    asked = options.dtype if isinstance(options, SelectionOptions) else None
    model, tokenizer = load_base(base_model, dtype=asked or "auto", model_dir=MODEL_DIR, **placed(options.device))
    if asked == "auto":
        note_dtype(str(model.device), str(model.dtype))
    return Opened(model, tokenizer, pool)


def note_dtype(device: str, dtype: str) -> None:
    """Says so if a CPU computes in bfloat16; for commands with the option `--dtype`, if nobody has given it."""
    if device == "cpu" and dtype.endswith("bfloat16"):
        note("computing in bfloat16, as the base model is stored; --dtype float32 is slower, and rounds less")


def open_engine(
    options: ModelOptions,
    base_model: str,
    probe_text: ProbeText | None = None,
    allow_pickle: bool = False,
    **further: Any,
) -> LoGo:
    """Loads the base model and the pool, and returns an engine on them with `further` options of `LoGo`."""
    settings = selection_settings(options, probe_text)
    return open_base(options, base_model, allow_pickle).engine(settings, **further)


def placed(device: str) -> dict[str, Any]:
    """The options of `LoGo.from_pretrained` for the value of `--device`; none for `auto`. Errors as `device_of`."""
    if device == "auto":
        return {}
    if device == "spread":
        return {"device_map": "auto"}
    return {"device": device_of(device)}


def device_of(name: str) -> str:
    """The device that `--device` names, by the rule of the library. A bare number is a GPU's, as with the official
    `--gpu`, and means `auto` on a machine without numbered GPUs; 0 always does, and -1 is the CPU.

    Raises:
        UsageError: a device that is not there.
    """
    import torch

    name = {"0": "auto", "-1": "cpu"}.get(name, name)
    if name.isdigit():
        name = f"cuda:{name}" if torch.cuda.is_available() else "auto"
    return str(pick_device(name))


def quiet_transformers() -> None:
    """Turns off transformers' notes and loading bars, which would bury the answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
