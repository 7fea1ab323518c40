"""The tensors of a base model: which there are, on which devices, and those that accelerate has offloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from logo.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def stored(model: Any, *, shared: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint by their names: the parameters, and the buffers in which quantised layers have their
    weights. Other buffers follow from the configuration.

    Args:
        shared: whether a parameter that has several names comes under each of them.
    """
    yield from model.named_parameters(remove_duplicate=not shared)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def devices(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """The devices that compute: those of the weights, and those to which accelerate moves offloaded ones."""
    import torch

    found = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    targets = {getattr(hook, "execution_device", None) for module in model.modules() for hook in hooks(module)}
    return tuple(sorted(found | {torch.device(target) for target in targets if target is not None}, key=str))


def hooks(module: Any) -> Sequence[object]:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def tensor_of(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer of a model by its name.

    If accelerate has offloaded it, it is read from the host or the disk. If another process holds it, it is read from
    the checkpoint, and empty if the checkpoint does not have it.

    Raises:
        ModelError: it is neither in memory nor where accelerate keeps what is offloaded.
    """
    parts = name.split(".")
    found: torch.Tensor = getattr(model.get_submodule(".".join(parts[:-1])), parts[-1])
    read = getattr(found, "read", None)
    if found.device.type != "meta" or read is not None:
        return found if read is None else read()
    for cut in range(len(parts) - 1, -1, -1):  # the hook of the module or of one that contains it
        for hook in hooks(model.get_submodule(".".join(parts[:cut]))):
            kept = getattr(hook, "weights_map", None)
            if kept is not None:
                with suppress(KeyError):
                    found = kept[".".join(parts[cut:])]
                    return found
    raise ModelError(
        f"base model: weight {name} is not in memory, and accelerate does not keep it either; expected a model with "
        "all its weights"
    )
