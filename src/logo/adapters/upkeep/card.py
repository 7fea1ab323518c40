"""The model card of a pool (content, use, origin) in Markdown with the Hub's front matter.

It is made from the adapters and from `pool.json`, in which any entry may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logo.adapters.format import Adapter
from logo.adapters.notes import BEFORE, CHANGES
from logo.hub.names import is_hub_id, is_repo_id

PICTURE = "study.png"
# Values of vLLM's --max-lora-rank.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# The default folder of base models; `hf_models/Qwen2.5-7B` looks like a Hub id but is none.
_MODELS = "hf_models"
_NAMES = ("base", "base_model", "base_model_name_or_path")
# Keys of a study, and the headings of their columns.
_MEASURES = {"top1": "top-1", "top3": "top-3", "mrr": "MRR", "exact_match": "exact match", "nll": "NLL"}
_LONGEST = 400  # longer entries of `pool.json` are summarised


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        title: the pool's name.
        adapters: in pool order.
        root: the pool's folder, with the adapters.
        notes: `pool.json`.
        base_model: a Hub id or a name; None: the one that all adapters or the notes name.
        place: the pool on a command line: a Hub repository with a folder in it, or a folder.
        licence: the front matter's `license`.
        study: the JSON of `logo eval study`.
        picture: whether `study.png` is beside the card.
    """

    title: str
    adapters: Sequence[Adapter]
    root: Path
    notes: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    place: str = "adapters"
    licence: str | None = None
    study: Mapping[str, Any] | None = None
    picture: bool = False

    def __str__(self) -> str:
        """The whole `README.md`."""
        from huggingface_hub import ModelCard, ModelCardData

        base = self.base
        data = ModelCardData(
            base_model=base if base is not None and is_repo_id(base) else None,
            library_name="peft",
            pipeline_tag="text-generation",
            tags=["lora", "peft", "lora-pool", "logo"],
            license=self.licence,
        )
        if data.base_model is not None:
            data["base_model_relation"] = "adapter"
        parts = [self._head(), self._table(), self._use(), self._found(), self._origin()]
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))

    @property
    def base(self) -> str | None:
        """The base model; of a folder, its name. None if it is not known or there are several."""
        if self.base_model is not None:
            return _public(self.base_model, given=True)
        if len(self.bases) > 1:
            return None
        said = [self.notes[key] for key in _NAMES if isinstance(self.notes.get(key), str)]
        names = [*map(_public, said), *self.bases]
        return next(filter(is_repo_id, names), next(iter(names), None))

    @property
    def bases(self) -> list[str]:
        """The distinct base models that the adapters name, by Hub id or folder."""
        found: dict[str, str] = {}
        for name in sorted({adapter.config.base_model for adapter in self.adapters} - {None, ""}, key=str):
            shown = _public(str(name))
            last = shown.rsplit("/", 1)[-1].casefold()
            if last not in found or is_repo_id(shown):
                found[last] = shown
        return sorted(found.values())

    def _head(self) -> str:
        count = len(self.adapters)
        many = f"{count} LoRA adapters" if count != 1 else "One LoRA adapter"
        named = [self.base] if self.base is not None else self.bases
        bases = ", ".join(f"`{name}`" for name in named) or "the base model that they were trained on"
        return f"# {self.title}\n\n{many} for {bases}, in PEFT's format."

    def _table(self) -> str:
        losses = _losses(self.notes, [adapter.name for adapter in self.adapters])
        several = self.base is None and len(self.bases) > 1
        heads = ["adapter", *(["base model"] if several else []), "rank", "targets", "parameters", "bytes", *losses]
        rows = []
        for adapter in self.adapters:
            targets = sorted({path.rsplit(".", 1)[-1] for path in adapter.modules})
            cells = [
                f"`{adapter.name}`",
                *([f"`{_public(adapter.config.base_model or '?')}`"] if several else []),
                short_ranks(adapter.ranks),
                ", ".join(targets),
                f"{adapter.parameters:,}",
                f"{adapter.size:,}",
            ]
            rows.append(cells + [losses[head].get(adapter.name, "") for head in losses])
        return "## Adapters\n\n" + _markdown(heads, rows)

    def _use(self) -> str:
        first, base = self.adapters[0], self.base or "BASE_MODEL"
        rank = max(adapter.ranks[-1] for adapter in self.adapters)
        served = next((known for known in _VLLM_RANKS if known >= rank), rank)
        repo, folder = self._split()
        below = first.folder.relative_to(self.root).as_posix()  # `.` if the pool is this one adapter
        inside = _joined(folder, below)
        here = _joined(self.place, below) or "."
        where = f'"{here}"'
        if is_repo_id(repo):
            where = f'"{repo}", subfolder="{inside}"' if inside else f'"{repo}"'
        only = f" --include '{folder}/*'" if folder else ""
        local = _joined("pool", inside) if is_repo_id(repo) else here
        lines = [
            "## Use",
            "",
            "With [LoGo](https://arxiv.org/abs/2511.07129), which picks and mixes the right adapters for every prompt:",
            "",
            "```sh",
            f'logo generate "..." --base-model {base} --adapters {self.place}',
            f"logo serve --base-model {base} --adapters {self.place}",
            "```",
            "",
            "One of them with PEFT:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f"model = PeftModel.from_pretrained(model, {where})",
            "```",
            "",
            "With vLLM:",
            "",
            "```sh",
            *([f"hf download {repo}{only} --local-dir pool"] if is_repo_id(repo) else []),
            f"vllm serve {base} --enable-lora --max-lora-rank {served} \\",
            f"  --lora-modules '{_module(first, local)}'",
            "```",
        ]
        return "\n".join(lines)

    def _split(self) -> tuple[str, str]:
        """Repository and folder in it, or a local folder and an empty text."""
        parts = self.place.split("/")
        repo = "/".join(parts[:2])
        return (repo, "/".join(parts[2:])) if is_repo_id(repo) else (self.place, "")

    def _found(self) -> str:
        """The section with the results of a study."""
        if self.study is None and not self.picture:
            return ""
        parts = ["## Which adapters answer which prompts"]
        signals = (self.study or {}).get("signals")
        if isinstance(signals, Mapping) and signals:
            known = [key for key in _MEASURES if any(_number(entry, key) is not None for entry in signals.values())]
            rows = [
                [f"`{name}`", *(f"{value:.2f}" if (value := _number(entry, key)) is not None else "" for key in known)]
                for name, entry in signals.items()
            ]
            parts.append(
                "Every prompt belongs to the task of one adapter. Top-1, top-3 and MRR say how high a signal ranks "
                "that adapter, exact match and NLL how good the answer is under the mixture that it selects."
            )
            parts.append(_markdown(["signal", *(_MEASURES[key] for key in known)], rows))
        if self.picture:
            parts.append(f"![Mean weight of every adapter on the prompts of every task]({PICTURE})")
        return "\n\n".join(parts)

    def _origin(self) -> str:
        """The section with the entries of `pool.json`; long ones are counted."""
        notes = {key: value for key, value in self.notes.items() if value not in (None, "", [], {})}
        lines = [f"- {key}: {_steps(value) if key == CHANGES else _told(value)}" for key, value in notes.items()]
        return "\n".join(["## Where they come from", "", *lines]) if lines else ""


def short_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks as `8` or `4/8/16`, or `1–16` if there are many."""
    return "/".join(map(str, ranks)) if len(ranks) <= 3 else f"{ranks[0]}–{ranks[-1]}"


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part not in ("", "."))


def _public(name: str, given: bool = False) -> str:
    """A base model's name for others: its Hub id, or the last part of a local folder.

    Args:
        given: the user gave the name, so that it is a Hub id even if there is a folder of that name.
    """
    folder = name.rstrip("/")
    on_hub = (is_repo_id if given else is_hub_id)(folder) and not folder.startswith(f"{_MODELS}/")
    return folder if on_hub else folder.rsplit("/", 1)[-1]


def _module(adapter: Adapter, local: str) -> str:
    return json.dumps({"name": adapter.name, "path": local}, ensure_ascii=False)


def _losses(notes: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The losses in the notes: name of the loss -> adapter -> number."""
    found: dict[str, dict[str, str]] = {}
    for entries in (value for key, value in notes.items() if key != BEFORE):
        if not isinstance(entries, Mapping) or not set(names) & set(entries):
            continue
        for name in names:
            for key, value in _numbers(entries.get(name), deep=True):
                if "loss" in key:
                    found.setdefault(key.replace("_", " "), {})[name] = f"{value:.3f}"
    return found


def _numbers(entry: Any, deep: bool = False) -> Iterator[tuple[str, float]]:
    """Numbers by name; with `deep` also those one level down, where `logo train` writes them."""
    if isinstance(entry, Mapping):
        for key in entry:
            value = _number(entry, key)
            if value is not None:
                yield str(key), value
            elif deep:
                yield from _numbers(entry[key])


def _number(entry: Any, key: str) -> float | None:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _steps(changes: Any) -> str:
    """The changes of a pool as text: `prune (energy 0.9), convert (dtype bf16)`."""
    steps = []
    for change in changes if isinstance(changes, list) else ():
        if isinstance(change, Mapping) and isinstance(change.get("command"), str):
            how = [f"{key} {value}" for key, value in change.items() if isinstance(value, (str, int, float)) and value]
            how = [entry for entry in how if entry != f"command {change['command']}"]
            steps.append(change["command"] + (f" ({', '.join(how)})" if how else ""))
    return ", ".join(steps) or _told(changes)


def _told(value: Any) -> str:
    if isinstance(value, str):
        return " ".join(value.split())
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST:
        return text if isinstance(value, (int, float)) else f"`{text}`"
    return f"{len(value)} entries in `pool.json`" if isinstance(value, (list, Mapping)) else f"`{text[:_LONGEST]}`..."


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
