"""Public pools by a short name: `--adapters preset:lots-of-loras`.

A preset stands for places on the Hub as `--adapters` takes them. Adapters that do not fit the base model are refused or
left out as those of any other pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from logo.errors import UsageError, closest

PREFIX = "preset:"


@dataclass(frozen=True)
class Preset:
    """A public pool.

    Attributes:
        places: of its adapters, as `--adapters` takes them.
        base_model: the model on which they were trained.
        note: one line about the pool.
        refused: why it cannot be used; empty if it can.
    """

    places: tuple[str, ...]
    base_model: str
    note: str
    refused: str = ""


def _official(name: str, base_model: str) -> Preset:
    place = f"archon159/LoGo-loras-collection/{name}-loras-flanv2"
    return Preset((place,), base_model, "the adapters of the LoGo paper: 260 tasks of FLAN v2")


def _granite(name: str, what: str) -> Preset:
    note = f"IBM's adapters {what}, for several Granite models: NAME/BASE/lora, and alora beside it"
    return Preset((f"ibm-granite/granitelib-{name}-r1.0",), "ibm-granite/granite-*", note)


PRESETS = {
    "logo-llama-3.1-8b": _official("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    "logo-qwen2.5-7b": _official("Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
    "logo-deepseek-7b": _official("deepseek-llm-7b-base", "deepseek-ai/deepseek-llm-7b-base"),
    "lots-of-loras": Preset(
        ("Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task*",),
        "mistralai/Mistral-7B-Instruct-v0.2",
        "904 tasks of Natural Instructions, a repository each",
    ),
    "loraretriever": Preset(
        ("Styxxxx/llama2_7b_lora-*",),
        "meta-llama/Llama-2-7b-hf",
        "tasks of FLAN v2, a repository each, of which LoraRetriever's tables use 48",
    ),
    "predibase": Preset(
        ("predibase/*",), "mistralai/Mistral-7B-v0.1", "LoRA Land: 25 tasks, beside other repositories of its owner"
    ),
    "phi3-experts": Preset(
        ("TahaBa/phi3-mini-clustered-flan/ts_expert_*",),
        "microsoft/Phi-3-mini-*",
        "ten experts of clusters of FLAN",
    ),
    "granite-rag": _granite("rag", "around retrieval"),
    "granite-core": _granite("core", "of general use"),
    "granite-guardian": _granite("guardian", "that judge answers"),
    "lorahub": Preset(
        ("lorahub/flan_t5_large-*",),
        "google/flan-t5-large",
        "adapters of LoraHub",
        refused="its adapters are for flan-t5-large, an encoder-decoder; LoGo answers with decoder-only models",
    ),
}


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UsageError: there is none, or it cannot be used.
    """
    found = PRESETS.get(name)
    if found is None:
        usable = ", ".join(key for key, one in PRESETS.items() if not one.refused)
        raise UsageError(f"no preset {name!r}{closest(name, PRESETS)}: expected one of {usable}")
    if found.refused:
        raise UsageError(f"preset {name!r}: {found.refused}")
    return found
