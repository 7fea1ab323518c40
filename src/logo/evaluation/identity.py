"""What the results of a run depend on, and nothing else: by it a run knows its own journal, result and shards.

Two parts, because they are treated apart. The *identity* is what was asked for: the base model's weights and tokenizer,
settings, rows, and how answers are generated. The *environment* is what it runs on: versions and the kind of device,
which agree to rounding but not always to the last token. Where files lie, which of several equal devices answers and
how many prompts it takes at once are no part of either. What is recorded of the base model is a digest of a sample of
its weights, not where it was found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from logo import __version__
from logo.errors import ModelError
from logo.evaluation.datasets import Row
from logo.evaluation.journal import fingerprint
from logo.models import hooks

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from logo.calls import Calls

# Settings that change how fast a prompt is read, not what is read.
_NO_MATTER = frozenset({"cache", "prefix_cache_gb"})
_ELSEWHERE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})  # of a configuration
_SAMPLE = 16  # weights of each parameter
_TEXT = "  It's 1,234 km  to Zürich\n\tand\u00a0back: e\u0301 \U0001f600"  # of what tokenizers read differently


def engine_identity(logo: Calls, base_model: str, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Of an engine, as JSON: base model, settings, and how answers are generated. The pool is recorded beside it.

    Args:
        base_model: as the user names it; its last part counts.
        generation: options of `LoGo.generate`; a `generation_config` counts by what differs from transformers' own.
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
        "fold": logo.folding["asked"],
        "merge": asdict(logo.merge),
        "settings": {**settings, "k": logo.k, "points": list(logo.points)},
        "truncation": asdict(logo.prompts.truncation),
        "generation": options,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def digests(logo: Calls) -> dict[str, Any]:
    """Of all that was loaded, but for the adapters' weights (see `pool_digests`): the base model's weights and
    configuration, the tokens at which an answer ends, the tokenizer, and the adapters' scales."""
    configured = getattr(logo.model, "generation_config", None)
    return {
        "weights": weights_digest(logo.model),
        "config": config_digest(logo.model.config),
        "eos_token_id": None if configured is None else configured.eos_token_id,
        "tokenizer": tokenizer_digest(logo.tokenizer),
        "scales": fingerprint({name: logo.pool[name].scales for name in logo.names}),
    }


def environment(logo: Calls) -> dict[str, str]:
    """Versions that results depend on, and the kind of device: `cpu`, or the name of the GPUs."""
    return {
        **library_versions(),
        **logo.versions,
        "device": ", ".join(sorted({_kind(device) for device in logo.devices})),
    }


def library_versions() -> dict[str, str]:
    """Versions that results depend on, in this process."""
    import torch
    import transformers

    return {"logo": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def pool_digests(logo: Calls) -> dict[str, str]:
    """SHA-256 by name of the adapters in use, in pool order."""
    found = logo.pool.sha256()
    return {name: found[name] for name in logo.names}


def rows_digest(rows: Sequence[Row]) -> str:
    """The SHA-256 of everything in these rows, in hex."""
    return fingerprint({"rows": [row.as_dict() for row in rows]})


def order_dependence(logo: Calls, generation: Mapping[str, Any]) -> str | None:
    """Why a row's result depends on the rows before it, in a few words; None if it does not."""
    if logo.settings.probe_context == "carry":
        return "--probe-context carry probes with the adapters of the row before"
    if logo.settings.baseline == "running":
        return "--baseline running compares with the rows before"
    config = generation.get("generation_config")
    if generation.get("do_sample", False if config is None else config.do_sample):
        asks = "an option asks" if "do_sample" in generation else "the model's generation config asks"
        return f"{asks} for sampling"
    return None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what a tokenizer makes of texts: vocabulary, merges, normaliser, added and special tokens; SHA-256 in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        # How the last call padded and cut, if it did.
        whole = {key: value for key, value in whole.items() if key not in ("padding", "truncation")}
    else:
        reads = tokenizer(_TEXT)["input_ids"]
        whole = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "reads": reads}
    return fingerprint({"tokenizer": whole, "special": tokenizer.special_tokens_map})


def config_digest(config: PretrainedConfig) -> str:
    """Of a base model's configuration, without where it lies and what is recorded elsewhere; SHA-256 in hex."""
    return fingerprint({"config": _said(config.to_dict())})


def _said(content: Any) -> Any:
    """Configurations of parts, such as a multimodal model's, are cleaned too."""
    if not isinstance(content, Mapping):
        return content
    return {str(key): _said(value) for key, value in content.items() if key not in _ELSEWHERE}


def weights_digest(model: PreTrainedModel) -> str:
    """Of a few weights of every parameter, wherever they are kept: enough to tell two models apart, at no cost.

    Raises:
        ModelError: a parameter is neither in memory nor where accelerate keeps what is offloaded.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in _weights(model):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by name, shared ones under each of their names; those that accelerate keeps on the host or on the
    disk until they are used are read there, as every forward pass does, and those that another process has, in the
    checkpoint."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta":
            yield name, parameter
        else:
            yield name, parameter.read() if hasattr(parameter, "read") else _offloaded(modules, name)


def _offloaded(modules: Mapping[str, torch.nn.Module], name: str) -> torch.Tensor:
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):  # the hook of the module itself, or of one that it is part of
        for hook in hooks(modules[".".join(parts[:cut])]):
            kept = getattr(hook, "weights_map", None)
            if kept is not None:
                with contextlib.suppress(KeyError):
                    found: torch.Tensor = kept[".".join(parts[cut:])]
                    return found
    raise ModelError(
        f"base model: weight {name} is not in memory, and accelerate does not keep it either; expected a model with "
        "all its weights"
    )


def _kind(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
