"""What the options describe: settings, a base model with its pool, and the engine on them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logo.adapters.pool import DEFAULT_K, AdapterPool
from logo.cli.belonging import check_selection_options
from logo.cli.choices import Context, Preset
from logo.cli.expanded import given
from logo.cli.options import DEFAULT_PREFIX_CACHE_GB, DEFAULT_SIGNAL, EngineOptions, RunnerOptions, changed
from logo.cli.output import err, note, progress
from logo.errors import StorageError, UsageError
from logo.models import load_base, load_config, pick_device
from logo.rows import text_lines
from logo.selection.texts import WHOLE, Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from logo.engine import LoGo
    from logo.prompts import Truncation
    from logo.selection.settings import SelectionSettings

_SLOTS = """vLLM keeps adapters in slots: `--vllm-options '{"max_loras": N, "max_lora_rank": R}'`"""
# Options that vLLM's offline engine does not have, and what to do instead.
_INSTEAD = {
    "allow_pickle": "vLLM's processes only read safetensors",
    "adapter_memory_gb": _SLOTS,
    "merge": "nothing is merged there; leave it out",
    "device": "set CUDA_VISIBLE_DEVICES",
    "device_map": """use `--vllm-options '{"tensor_parallel_size": N}'`""",
}


def open_pool(options: EngineOptions, base_model: str, preset: Preset | None = None) -> AdapterPool:
    """The pool the options name, or the base model's own; under the preset with the names of the official script.

    Adapters have no example prompts under `--examples ignore`.
    """
    from logo.adapters import pool as pools

    pool = pools.open_pool(
        options.adapters,
        base_model,
        options.model_dir,
        on_bad_adapter=options.on_bad_adapter,
        allow_pickle=options.allow_pickle,
        examples=options.examples,
        # To leave damaged adapters out, they have to be found before the first prompt, not in the middle of a run.
        verify=True if options.on_bad_adapter == "skip" else None,
    )
    official = preset == "official"
    return pools.officially_named(pool, base_model, options.adapters) if official else pool


def asked_k(options: EngineOptions, preset: Preset | None = None) -> int | None:
    """Adapters per prompt; None: the pool's own number."""
    return DEFAULT_K if preset == "official" and options.n_selected_modules is None else options.n_selected_modules


def selection_settings(options: EngineOptions, preset: Preset | None = None) -> SelectionSettings:
    """The settings of probe and selection; raises for values that cannot be used, before a model is loaded."""
    from logo.selection.settings import SelectionSettings

    return SelectionSettings(
        signal=options.signal or DEFAULT_SIGNAL,
        k=asked_k(options, preset),
        weighting=options.weighting,
        when_unsure=options.when_unsure,
        unsure_below=options.unsure_below,
        examples=options.examples,
        window=_window(options.window),
        probe_text=options.probe_text,
        activation=options.activation,
        calibration_prompts=_lines(options.calibration_prompts),
        cache=options.cache,
        unscorable=options.unscorable,
    )


# Seconds after which a command without a terminal says what it waits for.
QUIET = 20.0


@dataclass(frozen=True)
class Opened:
    """A loaded base model and a pool, for any number of engines."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pool: AdapterPool

    def uncalibrated(self, options: EngineOptions, settings: SelectionSettings, **further: Any) -> LoGo:
        """An engine with these settings, which calibrates the pool when it first selects; `further` options of `LoGo`
        are not None."""
        from logo.engine import LoGo

        return LoGo(
            self.model,
            self.tokenizer,
            self.pool,
            settings=settings,
            adapter_memory_gb=options.adapter_memory_gb,
            prefix_cache_gb=DEFAULT_PREFIX_CACHE_GB if options.prefix_cache_gb is None else options.prefix_cache_gb,
            merge=options.merge,
            on_bad_adapter=options.on_bad_adapter,
            **further,
        )

    def engine(self, options: EngineOptions, settings: SelectionSettings, **further: Any) -> LoGo:
        """An engine with these settings, on the calibrated pool."""
        # The preset's k is reduced to a smaller pool without a warning, since the user did not ask for it.
        if options.n_selected_modules is None and settings.k is not None:
            settings = replace(settings, k=min(settings.k, len(self.pool)))
        logo = self.uncalibrated(options, settings, **further)
        late = threading.Timer(QUIET, note, ["calibrating the pool (once, if there is a cache folder) ..."])
        late.daemon = True
        with progress(disable=not err.is_terminal) as shown:
            bar = shown.add_task("calibrating", total=None, visible=False)
            if not err.is_terminal:
                late.start()
            try:
                logo.calibrate(tell=lambda done, of: shown.update(bar, total=of, completed=done, visible=True))
            finally:
                late.cancel()
        return logo


def open_base(
    options: EngineOptions,
    base_model: str,
    preset: Preset | None = None,
    check: Callable[[AdapterPool], object] | None = None,
) -> Opened:
    """Opens the pool and loads the base model.

    Args:
        check: raises for a pool that cannot be used, before the base model is loaded.
    """
    quiet_transformers()
    load_config(base_model, model_dir=options.model_dir)  # may it be read?
    pool = open_pool(options, base_model, preset)
    if check is not None:
        check(pool)
    model, tokenizer = load_base(
        base_model,
        device=device_of(options.device),
        dtype=options.dtype or ("float32" if preset == "official" else "auto"),
        device_map=options.device_map,
        model_dir=options.model_dir,
    )
    return Opened(model, tokenizer, pool)


def open_engine(options: EngineOptions, base_model: str) -> LoGo:
    """Loads the base model and the pool, and returns an engine on them."""
    settings = selection_settings(options)
    check_selection_options([settings])
    return open_base(options, base_model).engine(options, settings)


def open_any(
    options: EngineOptions,
    runner: RunnerOptions,
    base_model: str,
    *,
    preset: Preset | None = None,
    probe_context: Context | None = None,
    truncation: Truncation | None = None,
) -> LoGo:
    """An engine in this process or inside vLLM, as `runner` says."""
    asked = _vllm_options(runner)
    settings = selection_settings(options, preset)
    context = probe_context or ("carry" if preset == "official" else "base")
    check_selection_options([settings])
    if runner.engine == "local":
        how: Any = {"truncation": truncation, "probe_context": context}
        return open_base(options, base_model, preset).engine(options, settings, **how)
    for name, flag in changed(options, *_INSTEAD).items():
        raise UsageError(f"{flag}: the engine 'vllm' has no such option; {_INSTEAD[name]}")
    # Set before vLLM is imported, so that its messages stay out of this command's output.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    quiet_transformers()
    from logo.engine import LoGo

    return LoGo.from_pretrained(
        base_model,
        options.adapters,
        engine=runner.engine,
        preset=preset,
        dtype=options.dtype or "auto",
        model_kwargs=asked,
        model_dir=options.model_dir,
        truncation=truncation,
        on_bad_adapter=options.on_bad_adapter,
        probe_context=None if context == "base" else context,
        **asdict(settings),
    )


def check_batch_size(runner: RunnerOptions) -> None:
    """Raises UsageError for `--batch-size` with an engine that takes all prompts at once."""
    if runner.engine == "vllm" and "batch_size" in given():
        raise UsageError("--batch-size: the engine 'vllm' runs all prompts at once; leave it out")


def _vllm_options(runner: RunnerOptions) -> dict[str, Any]:
    text = runner.vllm_options
    if text is None:
        return {}
    if runner.engine != "vllm":
        raise UsageError("--vllm-options is only for the engine 'vllm'; add --engine vllm or leave it out")
    from logo.vllm.options import json_object

    return json_object(text, "--vllm-options")


def device_of(name: str) -> str:
    """The device that `--device` names, by the rule of the library. A bare number is a GPU's, as with the official
    `--gpu`, and means `auto` on a machine without numbered GPUs.

    Raises:
        UsageError: a device that is not there.
    """
    import torch

    if name.isdigit():
        name = f"cuda:{name}" if torch.cuda.is_available() else "auto"
    return str(pick_device(name))


def _window(text: str | None) -> Window | None:
    if text is None or text == WHOLE:
        return text
    try:
        head, tail = map(int, text.split(","))
    except ValueError:
        raise UsageError(f"--window {text}: expected {WHOLE}, or two numbers of tokens such as 32,32") from None
    return head, tail


def _lines(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    try:
        return [line for line in text_lines(file) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--calibration-prompts {file}: cannot be read: {error}") from error


def quiet_transformers() -> None:
    """Turns off transformers' notes and loading bars, which would bury the answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
