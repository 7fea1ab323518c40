"""Options that several commands share, defined once; `logo.cli.opening` makes an engine of them.

An option is the default of a parameter or of a dataclass's field, as in `rounds: int = usual(5, "Measured rounds.")`; a
type that several commands share has the option in its annotation. A command takes a dataclass of options as one
parameter. `logo.cli.expanded` tells Typer of all of them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from logo.cli.choices import Engine, Examples, OnBad, ProbeText, Weights, WhenUnsure

POOL = "Pool"
PROBE = "Probe and selection"
DEVICE = "Device"
RARE = "Rarely needed"

DEFAULT_SIGNAL = "calibrated"
OFFICIAL_SIGNAL = "norm"
DEFAULT_PREFIX_CACHE_GB = 0.25


def option(help: str, shown: str | bool = True, *names: str, panel: str | None = None, **more: Any) -> Any:
    """What `--help` says of an option, in the annotation of a type that several commands share, such as `Json`.

    Args:
        shown: what the option is where it is not given; True: its default.
        names: None are needed for `--<the parameter's name>`.
    """
    return typer.Option(..., *names, help=help, show_default=shown, rich_help_panel=panel, **more)


def usual(default: Any, help: str, shown: str | bool = True, *names: str, repeated: bool = False, **more: Any) -> Any:
    """An option that `--help` shows, as the default of a command's parameter or of a dataclass's field.

    Args:
        default: `...` for an option that has to be given. An option whose default is False has no `--no-` form, unless
            `names` say so.
        repeated: whether it may be given several times; its values are joined with commas.
        shown, names, more: as `option`.
    """
    return field(default=default, metadata={"option": option(help, shown, *names, **more), "repeated": repeated})


def rare(default: Any, help: str, shown: str | bool = True, *names: str, panel: str = RARE, **more: Any) -> Any:
    """An option that few need, which `--help` shows below the others."""
    return usual(default, help, shown, *names, panel=panel, **more)


def argument(default: Any, **more: Any) -> Any:
    """An argument; `...` for one that has to be given."""
    return field(default=default, metadata={"option": typer.Argument(**more)})


def device_name(text: str) -> str:
    """The checked value of `--device`. A number is that of a GPU, as with the official `--gpu`; -1 is the CPU.

    Raises:
        typer.BadParameter: the text is not a device.
    """
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|\d+", text):
        return "auto" if text == "0" else text
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

Json = Annotated[bool, option("Print JSON instead.")]
Candidates = Annotated[
    list[str] | None,
    option("Select among these adapters only (repeatable).", True, "--candidate", metavar="NAME", panel=PROBE),
]
Device = Annotated[
    str, option("auto: the first GPU, if there is one.", False, metavar="auto|cpu|cuda[:N]", callback=device_name)
]
DeviceMap = Annotated[str | None, option("`auto` spreads a large model over several GPUs.", "none", panel=DEVICE)]
ModelDir = Annotated[str, option("Folder that is searched first for base models and adapters.", panel=DEVICE)]


# What `logo evaluate` calls an option, as the official script does, with its placeholder and text in the help.
OFFICIAL: dict[str, tuple[tuple[str, ...], str | None, str | None]] = {
    "signal": (("--selection-strategy", "--signal"), None, None),
    "device": (("--gpu", "--device"), "N", "GPU number, if there is one; -1 is the CPU."),
}

# Defaults that the help of `logo eval run` and `logo evaluate` shows instead of those below.
EVALUATING = {"base_model": "Llama-3.1-8B", "signal": OFFICIAL_SIGNAL}


@dataclass(frozen=True)
class EngineOptions:
    """Which model, which pool, how to probe and select. None: the preset's value, else the default shown."""

    base_model: str | None = usual(None, "Hub id, folder or short name.", "demo")
    adapters: str | None = usual(
        None,
        "Folder, Hub repo or manifest, several with commas (docs/adapter-pools.md).",
        "the base model's own",
        metavar="SOURCE",
        repeated=True,
    )
    on_bad_adapter: OnBad = _pool("error", "If an adapter cannot be used: refuse the pool, or skip the adapter.")
    unscorable: OnBad = _pool("error", "If an adapter lacks the probed module: refuse the pool, or skip the adapter.")
    allow_pickle: bool = _pool(False, "Also read adapter_model.bin (tensors only).")
    adapter_memory_gb: float | None = _pool(
        None, "Memory for adapters on the model's device, in GB.", "0.3 of what the model leaves free", min=0.0
    )
    merge: bool | None = _pool(
        None, "Merge the mixture into a copy of the weights.", "float32: where faster", "--merge/--no-merge"
    )
    prefix_cache_gb: float | None = _probe(
        None, "Memory for prefixes of prompts, if adapters act from a position on only, in GB.", "0.25", min=0.0
    )
    signal: str | None = usual(None, "`calibrated`, `norm` or `entropy`.", "calibrated")
    n_selected_modules: int | None = usual(
        None, "Adapters selected per prompt.", "20; demo: 3", "--n-selected-modules", "-k"
    )
    window: str | None = _probe(
        None,
        "How much of a prompt is probed: its first and last tokens (`32,32`), or `whole`.",
        "32,32; norm, entropy: whole",
        metavar="HEAD,TAIL",
    )
    probe_text: ProbeText | None = _probe(
        None,
        "Which part of a conversation is read: the user's last message, all of the user's, or everything.",
        "last_user; adapters with an invocation: all",
    )
    activation: str | None = _probe(
        None,
        "Tokens on which all adapters act, instead of those that they were trained for.",
        "as each was trained",
        metavar="everywhere|invocation|last:N",
    )
    calibration_prompts: Path | None = _probe(
        None,
        "Unlabelled prompts, one per line, by which the calibration chooses points.",
        "built-in ones",
        metavar="FILE",
    )
    cache: str | None = _probe(
        None,
        "Cache folder for what is computed once per pool; '' disables it.",
        "$LOGO_CACHE or ~/.cache/logo",
        metavar="DIR",
    )
    weighting: Weights | None = _probe(None, "How scores become weights.", "the signal's; official: linear")
    when_unsure: WhenUnsure = _probe(
        "mix",
        "What answers if the selection is unsure: a mixture of adapters, the base model alone, or nothing.",
    )
    unsure_below: float = _probe(0.15, "The confidence below which a selection is unsure.")
    examples: Examples = _probe(
        "use", "Compare prompts with the example prompts of adapters that have some (`logo pool examples`)."
    )
    device: Device = "auto"
    dtype: str | None = usual(None, "float32, bfloat16, float16 or auto.", False)
    device_map: DeviceMap = None
    model_dir: ModelDir = "./hf_models"


@dataclass(frozen=True)
class RunnerOptions:
    """Options for the engine that runs the model."""

    engine: Engine = usual("local", "This process, or vLLM (docs/vllm.md).")
    vllm_options: str | None = rare(
        None,
        'With `--engine vllm`: options of `vllm.LLM`, such as `{"max_model_len": 4096}`.',
        "none",
        metavar="JSON",
        panel=DEVICE,
    )
