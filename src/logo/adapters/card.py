"""The model card of a pool in Markdown with the Hub's front matter: its adapters, and how they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from logo.adapters.format import Adapter
from logo.hub import is_hub_id, is_repo_id

# The default folder of base models; `hf_models/Qwen2.5-7B` looks like a Hub id but is none.
_MODELS = "hf_models/"


def card_text(title: str, adapters: Sequence[Adapter], root: Path, repo: str, folder: str, licence: str | None) -> str:
    """The whole `README.md`.

    Args:
        title: the pool's name.
        adapters: in pool order.
        root: the pool's folder, with the adapters.
        repo: where the pool will be on the Hub; `folder`: in it, empty for its top.
        licence: the front matter's `license`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    bases = base_models(adapters)
    base = bases[0] if len(bases) == 1 else None
    on_hub = base if base is not None and is_repo_id(base) else None
    tags = ["lora", "peft", "lora-pool", "logo"]
    data = ModelCardData(
        base_model=on_hub, library_name="peft", pipeline_tag="text-generation", tags=tags, license=licence
    )
    if on_hub is not None:
        data["base_model_relation"] = "adapter"
    many = f"{len(adapters)} LoRA adapters" if len(adapters) != 1 else "One LoRA adapter"
    named = ", ".join(f"`{name}`" for name in bases) or "the base model that they were trained on"
    rows = ["| adapter | rank | targets | parameters |", "| --- | --- | --- | --- |"]
    for adapter in adapters:
        name, ranks = adapter.name.replace("|", "\\|"), "/".join(map(str, adapter.ranks))
        rows.append(f"| `{name}` | {ranks} | {', '.join(adapter.targets)} | {adapter.parameters:,} |")
    below = adapters[0].folder.relative_to(root).as_posix()  # `.` if the pool is this one adapter
    inside = "/".join(part for part in (folder, below) if part not in ("", "."))
    place = "/".join(filter(None, (repo, folder)))
    shown = base or "BASE_MODEL"
    return str(
        ModelCard(
            f"""---
{data.to_yaml()}
---

# {title}

{many} for {named}, in PEFT's format.

{chr(10).join(rows)}

With [LoGo](https://arxiv.org/abs/2511.07129), which picks and mixes the right adapters for every prompt:

```sh
logo generate "..." --base-model {shown} --adapters {place}
logo serve --base-model {shown} --adapters {place}
```

One of them with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{shown}")
model = PeftModel.from_pretrained(model, "{repo}"{f', subfolder="{inside}"' if inside else ""})
```
"""
        )
    )


def base_models(adapters: Sequence[Adapter]) -> list[str]:
    """The distinct base models that adapters name: Hub ids, or the last parts of local folders."""
    found: dict[str, str] = {}
    for name in sorted({adapter.config.base_model for adapter in adapters if adapter.config.base_model}):
        folder = name.rstrip("/")
        last = folder.rsplit("/", 1)[-1]
        on_hub = is_hub_id(folder) and not folder.startswith(_MODELS)
        if last.casefold() not in found or on_hub:
            found[last.casefold()] = folder if on_hub else last
    return sorted(found.values())
