"""What the results of a run depend on, and nothing else. A run recognises its journal and its result by it.

There are two parts. The *identity* is the request: the base model's weights and tokenizer, settings, rows, and the
options of generation. The *environment* is what it runs on: versions and the kind of device, whose results agree up to
rounding but not always to the last token. Paths, the choice among equal devices and the batch size belong to neither.
The base model is identified by a digest of a sample of its weights, not by its path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from logo.identity import config_digest, fingerprint, library_versions, tokenizer_digest, weights_digest
from logo.recorded import without_secrets
from logo.rows import Row
from logo.selection.reference import SCORES
from logo.selection.selector import EXAMPLES, HALVED, USUAL_SIZE
from logo.selection.signals import SIGNALS

if TYPE_CHECKING:
    import torch

    from logo.engine import LoGo

# Settings that change how fast a prompt is read, not what is read; and one that matters beside another
# (`rule_of_weights`).
_NO_MATTER = frozenset({"cache", "unsure_below"})


def engine_identity(logo: LoGo, base_model: str, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of an engine, as JSON: base model, settings, and options of generation. The pool is recorded
    separately.

    Args:
        base_model: as the user names it; its last part counts.
        generation: options of `LoGo.generate`; a `generation_config` counts by its differences from transformers' own.
    """
    settings = {name: value for name, value in asdict(logo.settings).items() if name not in _NO_MATTER}
    options = dict(generation)
    config = options.pop("generation_config", None)
    if config is not None:
        said = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
        said.pop("transformers_version", None)  # it is in the environment
        options["generation_config"] = said
    identity = {
        "base_model": PurePath(base_model).name,
        **digests(logo),
        "dtype": str(logo.model.dtype).removeprefix("torch."),
        "merge": logo.merge,
        "settings": {
            **settings,
            "probe_context": logo.probe_context,
            "k": logo.k,
            "points": list(logo.points),
            **rule_of_weights(logo),
        },
        "truncation": asdict(logo.prompts.truncation),
        **({"engine_options": without_secrets(logo.engine_options)} if logo.engine_options else {}),
        "generation": options,
        **plugins_used(SIGNALS.source(logo.settings.signal)),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def rule_of_weights(logo: LoGo) -> dict[str, Any]:
    """The constants and the threshold by which an engine with these settings turns scores into weights; its results
    depend on them."""
    found: dict[str, Any] = {}
    if (logo.settings.weighting or logo.scorer.signal.weighting) == "adaptive":
        found |= {"unsure_halved": HALVED, "usual_size": USUAL_SIZE}
        if _examples(logo):
            found |= {"temperatures": [list(pair) for pair in EXAMPLES.temperatures]}
    if logo.settings.when_unsure != "mix":
        found |= {"unsure_below": logo.settings.unsure_below}
    return found


def plugins_used(source: str | None) -> dict[str, list[str]]:
    """The part of an identity that names the plugin of a signal; empty if it is none."""
    return {} if source is None else {"plugins": [source]}


def digests(logo: LoGo) -> dict[str, Any]:
    """Digests of what was loaded, except the adapters' weights (`pool_digests`): the base model's weights and
    configuration, the tokens at which an answer ends, the tokenizer, the adapters' scales, where they act, unless all
    act everywhere, and the example prompts that selections look at, if there are some; and the version of the scores,
    if signals read all tokens or look at examples."""
    activations = {name: asdict(logo.fitted[name].activation) for name in logo.names}
    everywhere = all(one.everywhere for one in logo.fitted.activations)
    examples = _examples(logo)
    configured = getattr(logo.model, "generation_config", None)
    return {
        "weights": weights_digest(logo.model),
        "config": config_digest(logo.model.config),
        "eos_token_id": None if configured is None else configured.eos_token_id,
        "tokenizer": tokenizer_digest(logo.tokenizer),
        "scales": fingerprint({name: logo.pool[name].scales for name in logo.names}),
        **({} if everywhere else {"activations": fingerprint(activations)}),
        **({"examples": fingerprint(examples)} if examples else {}),
        **({"scores": SCORES} if examples or logo.scorer.signal.token in ("each", "tail") else {}),
    }


def _examples(logo: LoGo) -> dict[str, tuple[str, ...]]:
    """The example prompts of every adapter, if selections look at them and some adapter has any; otherwise empty."""
    if logo.settings.examples != "use" or logo.scorer.signal.scale != "whitened":
        return {}
    found = {name: logo.pool[name].examples for name in logo.names}
    return found if any(found.values()) else {}


def environment(logo: LoGo) -> dict[str, str]:
    """The versions that results depend on, and the kind of device: `cpu`, or the name of the GPUs."""
    return {
        **library_versions(),
        **logo.versions,
        "device": ", ".join(sorted({_kind(device) for device in logo.devices})),
    }


def pool_digests(logo: LoGo) -> dict[str, str]:
    """SHA-256 by name of the adapters in use, in pool order."""
    found = logo.pool.sha256()
    return {name: found[name] for name in logo.names}


def rows_digest(rows: Sequence[Row]) -> str:
    """The SHA-256 of the content of these rows, in hex."""
    return fingerprint({"rows": [row.as_dict() for row in rows]})


def order_dependence(logo: LoGo, generation: Mapping[str, Any]) -> str | None:
    """Why a row's result depends on the rows before it, in a few words; None if it does not."""
    if logo.probe_context == "carry":
        return "--probe-context carry probes with the adapters of the row before"
    config = generation.get("generation_config")
    if generation.get("do_sample", False if config is None else config.do_sample):
        asks = "an option asks" if "do_sample" in generation else "the model's generation config asks"
        return f"{asks} for sampling"
    return None


def _kind(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
