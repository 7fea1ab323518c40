"""A model card for a pool: what is in it, how it is used, where it comes from; Markdown with the Hub's front matter.

Knows nothing about a pool but what its adapters and its `pool.json` say, of which every part may be missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from logo.adapters.format import Adapter
from logo.adapters.hub import is_repo_id
from logo.adapters.notes import BEFORE, CHANGES

PICTURE = "study.png"
# Ranks that vLLM can be started for.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NAMES = ("base", "base_model", "base_model_name_or_path")
# What a study says of a signal, as the card's heads call it.
_MEASURES = {"top1": "top-1", "top3": "top-3", "mrr": "MRR", "exact_match": "exact match", "nll": "NLL"}
_LONGEST = 400  # characters of an entry of `pool.json` that is shown as it is


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Attributes:
        title: the pool's name.
        adapters: in pool order.
        notes: `pool.json`.
        base_model: a Hub id or a name; None: what the adapters or the notes agree on.
        place: how the pool is named on a command line: a Hub repository with a folder in it, or a folder.
        licence: the front matter's `license`.
        study: the JSON of `logo study`.
        picture: whether `study.png` lies beside the card.
    """

    title: str
    adapters: Sequence[Adapter]
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
        """The base model, as far as it is known; of one that lies in a folder, the folder's own name."""
        if self.base_model is not None:
            return self.base_model
        said = [self.notes[key] for key in _NAMES if isinstance(self.notes.get(key), str)]
        said += [name for name, _ in Counter(a.config.base_model for a in self.adapters).most_common() if name]
        first = next(iter(said), None)
        return first if first is None or is_repo_id(first) else first.rstrip("/").rsplit("/", 1)[-1]

    @property
    def _named(self) -> str:
        return self.base or "the base model that they were trained on"

    def _head(self) -> str:
        count = len(self.adapters)
        many = f"{count} LoRA adapters" if count != 1 else "One LoRA adapter"
        return f"# {self.title}\n\n{many} for {f'`{self.base}`' if self.base else self._named}, in PEFT's format."

    def _table(self) -> str:
        losses = _losses(self.notes, [adapter.name for adapter in self.adapters])
        heads = ["adapter", "rank", "targets", "parameters", "bytes", *losses]
        rows = []
        for adapter in self.adapters:
            targets = sorted({path.rsplit(".", 1)[-1] for path in adapter.modules})
            cells = [
                f"`{adapter.name}`",
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
        inside = "/".join(
            part for part in (folder, "" if len(self.adapters) == 1 and not folder else first.name) if part
        )
        where = f'"{repo}", subfolder="{inside}"' if is_repo_id(repo) else f'"{self.place}/{first.name}"'
        only = f" --include '{folder}/*'" if folder else ""
        local = "/".join(part for part in ("pool", folder) if part) if is_repo_id(repo) else self.place
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
        """Repository and folder in it; a local folder and nothing."""
        parts = self.place.split("/")
        repo = "/".join(parts[:2])
        return (repo, "/".join(parts[2:])) if is_repo_id(repo) else (self.place, "")

    def _found(self) -> str:
        """What a study measured."""
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
        """What `pool.json` says, entry by entry; what is too long to read is counted."""
        notes = {key: value for key, value in self.notes.items() if value not in (None, "", [], {})}
        lines = [f"- {key}: {_steps(value) if key == CHANGES else _told(value)}" for key, value in notes.items()]
        return "\n".join(["## Where they come from", "", *lines]) if lines else ""


def short_ranks(ranks: Sequence[int]) -> str:
    """Ranks, ascending, as `8` or `4/8/16`, and where there are many as `1–16`."""
    return "/".join(map(str, ranks)) if len(ranks) <= 3 else f"{ranks[0]}–{ranks[-1]}"


def _module(adapter: Adapter, local: str) -> str:
    return json.dumps({"name": adapter.name, "path": f"{local}/{adapter.name}"}, ensure_ascii=False)


def _losses(notes: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Every number called a loss that the notes hold for adapters by name: what it is called -> adapter -> number."""
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
    """Numbers by name; with `deep` also those one level further down, where `logo train` has them."""
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
    """What was done to the pool: `prune (energy 0.9), convert (dtype bf16)`."""
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
