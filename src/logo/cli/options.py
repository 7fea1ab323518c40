"""Options that several commands share, defined once; `logo.cli.opening` makes an engine of them.

A command takes them as one dataclass parameter; `logo.cli.expanded` turns the fields into options of the command line.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from logo.cli.choices import (
    Context,
    Engine,
    Examples,
    IndexKind,
    OnBad,
    ProbeText,
    Read,
    Reference,
    Token,
    Weights,
    WhenUnsure,
)

POOL = "Pool"
PROBE = "Probe and selection"
DEVICE = "Device"

# Metadata of a field whose option may be repeated; its values are joined with commas.
REPEATED = {"repeated": True}

DEFAULT_SIGNAL = "calibrated"
OFFICIAL_SIGNAL = "norm"
DEFAULT_PREFIX_CACHE_GB = 0.25


def usual(help: str, default: str | bool = True, *names: str, panel: str | None = None, **more: Any) -> Any:
    """An option that `--help` shows; `default` says what it is where it is not given."""
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel, **more)


def rare(help: str, default: str | bool = True, *names: str, panel: str | None = None, **more: Any) -> Any:
    """An option that only `--help-all` shows."""
    return usual(help, default, *names, panel=panel, hidden=True, **more)


def device_name(text: str) -> str:
    """The checked value of `--device`. A number is that of a GPU, as with the official `--gpu`; -1 is the CPU.

    Raises:
        typer.BadParameter: the text is not a device.
    """
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|\d+", text):
        return "auto" if text in ("0", "cuda:auto") else text
    if text == "-1":
        return "cpu"
    raise typer.BadParameter(f"expected auto, cpu, cuda, cuda:N or mps, found {text!r}")


def changed(options: Any, *names: str) -> dict[str, str]:
    """Field -> flag of those of these options that do not have their defaults, in the order of the fields.

    Args:
        options: a dataclass of options.
        names: of its fields; none: all of them.
    """
    found = {}
    for one in fields(options):
        value = getattr(options, one.name)
        if value != one.default and (not names or one.name in names):
            found[one.name] = f"--{'no-' if value is False else ''}{one.name.replace('_', '-')}"
    return found


_pool = functools.partial(rare, panel=POOL)
_probe = functools.partial(rare, panel=PROBE)

Json = Annotated[bool, usual("Print JSON instead.", True, "--json")]
Candidates = Annotated[
    list[str] | None, _probe("Select among these adapters only (repeatable).", True, "--candidate", metavar="NAME")
]
Device = Annotated[
    str, usual("auto: the first GPU, if there is one.", False, metavar="auto|cpu|cuda[:N]", callback=device_name)
]
DeviceMap = Annotated[str | None, rare("`auto` spreads a large model over several GPUs.", "none", panel=DEVICE)]
ModelDir = Annotated[str, rare("Folder that is searched first for base models and adapters.", panel=DEVICE)]


# Defaults that the help of `logo eval run` and `logo evaluate` shows instead of those below.
EVALUATING = {"base_model": "Llama-3.1-8B", "signal": OFFICIAL_SIGNAL, "prefix_cache_gb": "0"}


@dataclass(frozen=True)
class EngineOptions:
    """Which model, which pool, how to probe and select. None: the preset's value, else the default shown."""

    base_model: Annotated[str | None, usual("Hub id, folder or short name.", "demo")] = None
    adapters: Annotated[
        str | None,
        usual(
            "Folder, Hub repo or manifest, several with commas (docs/open-any-pool.md).",
            "the base model's own",
            metavar="PLACE",
        ),
    ] = field(default=None, metadata=REPEATED)
    on_bad_adapter: Annotated[OnBad, _pool("If an adapter cannot be used: refuse the pool, or skip the adapter.")] = (
        "error"
    )
    unscorable: Annotated[
        OnBad, _pool("If an adapter lacks the probed module: refuse the pool, or skip the adapter.")
    ] = "error"
    allow_pickle: Annotated[bool, _pool("Also read adapter_model.bin (tensors only).", True, "--allow-pickle")] = False
    adapter_memory_gb: Annotated[
        float | None,
        _pool("Memory for adapters on the model's device, in GB.", "0.3 of what the model leaves free", min=0.0),
    ] = None
    adapter_cache_gb: Annotated[
        float | None, _pool("Host memory for adapter files beside a GPU, in GB.", "as --adapter-memory-gb", min=0.0)
    ] = None
    fold: Annotated[
        bool | None, _pool("Fold the mixture into a copy of the weights.", "float32: where faster", "--fold/--no-fold")
    ] = None
    prefix_cache_gb: Annotated[
        float | None,
        _probe(
            "Memory for the keys and values of shared prompt prefixes, in GB.",
            "0.25",
            min=0.0,
        ),
    ] = None
    signal: Annotated[
        str | None,
        usual("`calibrated`, `norm`, `entropy`, `norm_z`, `arrow` or `spectr`.", "calibrated"),
    ] = None
    n_selected_modules: Annotated[
        int | None, usual("Adapters selected per prompt.", "20; demo: 3", "--n-selected-modules", "-k")
    ] = None
    probe_context: Annotated[
        Context | None,
        _probe("Adapters active while probing: none, the whole pool, or as the official script runs.", "base"),
    ] = None
    probe_input: Annotated[
        Read | None,
        _probe("Which vector is read: before or after the layer's input norm.", "the signal's; official: residual"),
    ] = None
    probe_token: Annotated[
        Token | None,
        _probe(
            "Which tokens are read: the last one, the mean of all, or each, whose scores are averaged.",
            "the signal's; official: last",
        ),
    ] = None
    probe_text: Annotated[
        ProbeText | None,
        _probe(
            "Which part of a conversation is read: the user's last message, all of the user's, or everything.",
            "last_user",
        ),
    ] = None
    probe_layer: Annotated[
        str | None,
        _probe("Which layer is read: `last`, an index, or several: `0,5,-1`.", "the signal's; official: last"),
    ] = None
    probe_module: Annotated[
        str | None, _probe("Which linear module is read, by name.", "the signal's; official: the query projection")
    ] = None
    probe_depth: Annotated[
        float | None,
        _probe(
            "Share of the layers that a signal with several points may read.",
            "0.5; activated adapters: 1",
        ),
    ] = None
    probe_points: Annotated[
        str | None,
        _probe(
            "How many points `calibrated` may choose, or the points: `4.v_proj,6.mlp.down_proj`.",
            "12",
            metavar="N|POINTS",
        ),
    ] = None
    activation: Annotated[
        str | None,
        _probe(
            "Tokens on which all adapters act, instead of those that they were trained for.",
            "as each was trained",
            metavar="everywhere|invocation|last:N",
        ),
    ] = None
    when_not_invoked: Annotated[
        str, _probe("What an adapter does for a prompt without its invocation tokens.", metavar="off|error|last:N")
    ] = "off"
    reference: Annotated[
        Reference,
        _probe("What responses are compared with: neutral text, or also earlier prompts (for servers)."),
    ] = "neutral"
    calibration_prompts: Annotated[
        Path | None,
        _probe(
            "Unlabelled prompts, one per line, by which the calibration chooses points.",
            "built-in ones",
            metavar="FILE",
        ),
    ] = None
    index: Annotated[
        IndexKind, _probe("Score every adapter, or only those that a first stage keeps (docs/many-adapters.md).")
    ] = "exact"
    index_rank: Annotated[int, _probe("Two stages: rank of each adapter in the first stage.")] = 2
    index_left: Annotated[
        int | None,
        _probe("Two stages: adapters left for exact scoring by a first stage that estimates.", "16 k, at least 256"),
    ] = None
    cache: Annotated[
        str | None,
        _probe(
            "Cache folder for what is computed once per pool; '' disables it.",
            "$LOGO_CACHE or ~/.cache/logo",
            metavar="DIR",
        ),
    ] = None
    weighting: Annotated[Weights | None, _probe("How scores become weights.", "the signal's; official: linear")] = None
    weight_temperature: Annotated[float, _probe("Temperature of `--weighting softmax`, in units of the score.")] = 0.5
    keep_mass: Annotated[
        float | None, _probe("Keep the best adapters that together hold this share of the weight.", "keep all")
    ] = None
    when_unsure: Annotated[
        WhenUnsure,
        _probe(
            "What answers if the confidence of the selection is low: a broad mixture, the base "
            "model alone, the best adapter alone, or nothing."
        ),
    ] = "mix"
    examples: Annotated[
        Examples, _probe("Compare prompts with the example prompts of adapters that have some (`logo pool examples`).")
    ] = "use"
    device: Device = "auto"
    dtype: Annotated[str | None, usual("float32, bfloat16, float16 or auto.", False)] = None
    device_map: DeviceMap = None
    model_dir: ModelDir = "./hf_models"


@dataclass(frozen=True)
class RunnerOptions:
    """Options for the engine that runs the model."""

    engine: Annotated[Engine, usual("This process, or vLLM (docs/vllm.md).")] = "local"
    vllm_options: Annotated[
        str | None,
        rare(
            'With `--engine vllm`: options of `vllm.LLM`, such as `{"max_model_len": 4096}`.',
            "none",
            metavar="JSON",
            panel=DEVICE,
        ),
    ] = None
