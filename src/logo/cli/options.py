"""Options that several commands share, defined once; `logo.cli.opening` makes an engine of them.

A command takes them as one dataclass parameter; `expanded` turns the dataclass's fields into command line options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

_F = TypeVar("_F", bound=Callable[..., Any])

POOL = "Pool"
PROBE = "Probe and selection"
DEVICE = "Device"

# Of a field whose option may be repeated: what is given is put together with commas.
REPEATED = {"repeated": True}

DEFAULT_SIGNAL = "calibrated"
OFFICIAL_SIGNAL = "norm"
DEFAULT_PREFIX_CACHE_GB = 0.25


Candidates = Annotated[
    list[str] | None,
    typer.Option("--candidate", metavar="NAME", help="Choose among these adapters only (repeatable)."),
]


class Choice(str, Enum):
    """A string option with fixed values."""

    def __str__(self) -> str:
        return str(self.value)


class OnBad(Choice):
    ERROR = "error"
    SKIP = "skip"


class Context(Choice):
    BASE = "base"
    POOL = "pool"
    CARRY = "carry"


class Read(Choice):
    RESIDUAL = "residual"
    PROJECTION = "projection"


class Token(Choice):
    LAST = "last"
    MEAN = "mean"
    EACH = "each"
    TAIL = "tail"


class ProbeText(Choice):
    ALL = "all"
    LAST_USER = "last_user"
    CONVERSATION = "conversation"


class Weights(Choice):
    LINEAR = "linear"
    SOFTMAX = "softmax"
    ADAPTIVE = "adaptive"


class WhenUnsure(Choice):
    MIX = "mix"
    BASE = "base"
    BEST = "best"
    REFUSE = "refuse"


class Examples(Choice):
    USE = "use"
    IGNORE = "ignore"


class BaselineKind(Choice):
    NEUTRAL = "neutral"
    RUNNING = "running"


class IndexKind(Choice):
    EXACT = "exact"
    TWO_STAGE = "two-stage"


class Preset(Choice):
    OFFICIAL = "official"


class Engine(Choice):
    LOCAL = "local"
    VLLM = "vllm"


@dataclass(frozen=True)
class EngineOptions:
    """Which model, which pool, how to probe and select. None: the preset's value, else the default shown."""

    base_model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder, `demo`, `Llama-3.1-8B`, `Qwen2.5-7B` or `deepseek-llm-7b-base`.",
            show_default="demo; evaluate: Llama-3.1-8B",
        ),
    ] = None
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_REPO",
            help="Folder of adapters, Hub repo `org/name[/folder][@revision]`, all repos `org/prefix-*`, manifest "
            "`pool.yaml`, or `preset:NAME`; several with commas, or repeated (docs/open-any-pool.md).",
            show_default="the base model's own",
            rich_help_panel=POOL,
        ),
    ] = field(default=None, metadata=REPEATED)
    on_bad_adapter: Annotated[
        OnBad,
        typer.Option(help="An adapter that cannot be used: refuse the pool, or leave it out.", rich_help_panel=POOL),
    ] = OnBad.ERROR
    unscorable: Annotated[
        OnBad, typer.Option(help="An adapter that lacks the probed module: likewise.", rich_help_panel=POOL)
    ] = OnBad.ERROR
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read adapter_model.bin too (tensors only).", rich_help_panel=POOL)
    ] = False
    adapter_memory_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory for adapters where the model computes, in GB.",
            min=0.0,
            show_default="0.3 of what is free beside the model",
            rich_help_panel=POOL,
        ),
    ] = None
    adapter_cache_gb: Annotated[
        float | None,
        typer.Option(
            help="Host memory for adapter files beside a GPU, in GB.",
            min=0.0,
            show_default="as --adapter-memory-gb",
            rich_help_panel=POOL,
        ),
    ] = None
    fold: Annotated[
        bool | None,
        typer.Option(
            "--fold/--no-fold",
            help="Add the mixture into a copy of the weights.",
            show_default="float32: when it pays",
            rich_help_panel=POOL,
        ),
    ] = None
    prefix_cache_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory for what prompts begin with, in GB.",
            min=0.0,
            show_default="0.25; evaluate, sweep: 0",
            rich_help_panel=PROBE,
        ),
    ] = None
    selection_strategy: Annotated[
        str | None,
        typer.Option(
            help="Signal: `calibrated`, the official `norm` or `entropy`, or `norm_z`, `arrow`, `spectr`.",
            show_default="calibrated; evaluate, sweep: norm",
            rich_help_panel=PROBE,
        ),
    ] = None
    n_selected_modules: Annotated[
        int | None,
        typer.Option(
            "--n-selected-modules",
            "-k",
            help="Adapters selected per prompt.",
            show_default="20; demo: 3",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_context: Annotated[
        Context | None,
        typer.Option(
            help="Adapters active while probing: none, the whole pool, or as the official script runs.",
            show_default="base",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_input: Annotated[
        Read | None,
        typer.Option(
            help="What is read: before or after the layer's input norm.",
            show_default="the signal's; official: residual",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_token: Annotated[
        Token | None,
        typer.Option(
            help="The last prompt token, the mean of all, or the scores of each, averaged.",
            show_default="the signal's; official: last",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_text: Annotated[
        ProbeText | None,
        typer.Option(
            help="Of a conversation: the user's last message, all of the user's, or everything that is read.",
            show_default="last_user",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_layer: Annotated[
        str | None,
        typer.Option(
            help="`last`, an index, or several: `0,5,-1`.",
            show_default="the signal's; official: last",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_module: Annotated[
        str | None,
        typer.Option(
            help="Linear module to read, by name.",
            show_default="the signal's; official: the query projection",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_depth: Annotated[
        float | None,
        typer.Option(
            help="How far the probe may go, as a share of the layers, where the signal reads several points.",
            show_default="0.5; of activated adapters 1",
            rich_help_panel=PROBE,
        ),
    ] = None
    probe_points: Annotated[
        str | None,
        typer.Option(
            metavar="N|POINTS",
            help="How many points `calibrated` may choose, or the points: `4.v_proj,6.mlp.down_proj`.",
            show_default="12",
            rich_help_panel=PROBE,
        ),
    ] = None
    activation: Annotated[
        str | None,
        typer.Option(
            metavar="everywhere|invocation|last:N",
            help="On which tokens all adapters act, whatever they were trained for.",
            show_default="as each was trained",
            rich_help_panel=PROBE,
        ),
    ] = None
    when_not_invoked: Annotated[
        str,
        typer.Option(
            metavar="off|error|last:N",
            help="What an adapter does in a prompt that lacks its invocation tokens.",
            rich_help_panel=PROBE,
        ),
    ] = "off"
    baseline: Annotated[
        BaselineKind,
        typer.Option(
            help="What responses are compared with: neutral text, or that and the prompts that came (for servers).",
            rich_help_panel=PROBE,
        ),
    ] = BaselineKind.NEUTRAL
    calibration_prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Unlabelled prompts like those to come, one per line, on which points are ranked.",
            show_default="some of ours",
            rich_help_panel=PROBE,
        ),
    ] = None
    index: Annotated[
        IndexKind,
        typer.Option(
            help="Score every adapter, or with a first stage that finds those worth it (docs/many-adapters.md).",
            rich_help_panel=PROBE,
        ),
    ] = IndexKind.EXACT
    index_rank: Annotated[
        int, typer.Option(help="Of two stages: the rank that the first keeps of an adapter.", rich_help_panel=PROBE)
    ] = 2
    index_left: Annotated[
        int | None,
        typer.Option(
            help="Of two stages: adapters that the first leaves where it estimates.",
            show_default="16 k, 256 at least",
            rich_help_panel=PROBE,
        ),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where what is computed once per pool is kept; '' keeps nothing.",
            show_default="$LOGO_CACHE or ~/.cache/logo",
            rich_help_panel=PROBE,
        ),
    ] = None
    weighting: Annotated[
        Weights | None,
        typer.Option(
            help="How scores become weights.", show_default="the signal's; official: linear", rich_help_panel=PROBE
        ),
    ] = None
    weight_temperature: Annotated[
        float, typer.Option(help="Of `--weighting softmax`, in units of the score.", rich_help_panel=PROBE)
    ] = 0.5
    keep_mass: Annotated[
        float | None,
        typer.Option(
            help="Of the selected adapters, keep the best that together hold this share of the weight.",
            show_default="keep all",
            rich_help_panel=PROBE,
        ),
    ] = None
    when_unsure: Annotated[
        WhenUnsure,
        typer.Option(
            help="What answers a prompt for which no adapter of the pool seems to be made: a broad mixture, the base "
            "model alone, the best adapter alone, or nothing.",
            rich_help_panel=PROBE,
        ),
    ] = WhenUnsure.MIX
    examples: Annotated[
        Examples,
        typer.Option(
            help="Compare prompts with the example prompts of adapters that have some (`logo pool examples`).",
            rich_help_panel=PROBE,
        ),
    ] = Examples.USE
    gpu: Annotated[
        int,
        typer.Option(help="GPU number; -1 for the CPU (used anyway where there is no GPU).", rich_help_panel=DEVICE),
    ] = 0
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16 or auto (float32 on the CPU, else the checkpoint's).",
            show_default="auto",
            rich_help_panel=DEVICE,
        ),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(help="`auto` spreads a large model over several GPUs.", rich_help_panel=DEVICE),
    ] = None
    model_dir: Annotated[
        str, typer.Option(help="Looked in first for base models and adapters.", rich_help_panel=DEVICE)
    ] = "./hf_models"


@dataclass(frozen=True)
class RunnerOptions:
    """What runs the model."""

    engine: Annotated[
        Engine,
        typer.Option(help="What runs the model: this process, or vLLM (docs/vllm.md).", rich_help_panel=DEVICE),
    ] = Engine.LOCAL
    vllm_options: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='With `--engine vllm`: options of `vllm.LLM`, such as `{"max_model_len": 4096}`.',
            show_default="none",
            rich_help_panel=DEVICE,
        ),
    ] = None


def expanded(command: _F) -> _F:
    """Gives a command one option for every field of its dataclass parameters."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        field_hints = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=_annotation(f, field_hints[f.name]),
            )
            for f in fields(groups[name])
        ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        made = {
            name: group(**{f.name: _joined(f, values.pop(f.name)) for f in fields(group)})
            for name, group in groups.items()
        }
        return command(**values, **made)

    parameters.sort(key=lambda p: p.kind)
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper  # type: ignore[return-value]


def _annotation(of: Field[Any], hint: Any) -> Any:
    if not of.metadata.get("repeated"):
        return hint
    return Annotated[tuple([list[str] | None, *hint.__metadata__])]  # Python 3.10 has no stars here


def _joined(of: Field[Any], value: Any) -> Any:
    if not of.metadata.get("repeated"):
        return value
    return ",".join(value) if value else None
