"""`BaseLayout`: the linear modules of a base model, and which of them a path in an adapter file means.

Paths and shapes are enough to check a pool against a model, so no model has to be run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Path segments that libraries put in front of the same model's modules.
_WRAPPERS = frozenset({"base_model", "model", "language_model", "text_model", "transformer", "module", "llm"})
# Kinds of models -> see `BaseLayout.uncalled`.
_UNCALLED = {
    "mamba": (".dt_proj",),
    "falcon_mamba": (".dt_proj",),
    "jamba": (".dt_proj",),
    "longcat_flash": (".router.classifier",),
}


@dataclass(frozen=True)
class LinearShape:
    """The sizes of a linear module of any class."""

    in_features: int
    out_features: int


def linear_shape(module: nn.Module) -> LinearShape | None:
    """The sizes of a linear module (also quantised ones and GPT-2's Conv1D), or None for any other module."""
    names = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    in_features, out_features = (getattr(module, name, None) for name in names)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return LinearShape(in_features, out_features)
    return None


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear module of the model with its dotted path."""
    return ((path, module) for path, module in model.named_modules() if path and linear_shape(module) is not None)


@dataclass(frozen=True)
class BaseLayout:
    """Paths and shapes of what an adapter may adapt: a base model's linear modules, and the embedding of its tokens.

    Attributes:
        shapes: path -> shape of every linear module.
        embeddings: path -> shape of the embedding; empty if there is no plain one.
        wrappers: path segments that may be missing or extra at the front of an adapter's path.
        uncalled: how paths of linear modules end whose weights the model uses without calling them, so that what an
            adapter adds to their output is added nowhere; they are not in `shapes`.
    """

    shapes: Mapping[str, LinearShape]
    embeddings: Mapping[str, LinearShape] = field(default_factory=dict, kw_only=True)
    wrappers: frozenset[str] = _WRAPPERS
    uncalled: tuple[str, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, model: nn.Module) -> BaseLayout:
        """The layout of a model; it may live on the meta device."""
        from torch import nn

        uncalled = _UNCALLED.get(getattr(getattr(model, "config", None), "model_type", ""), ())
        linear = {path: linear_shape(module) for path, module in linear_modules(model) if not path.endswith(uncalled)}
        shapes = {path: shape for path, shape in linear.items() if shape is not None}
        tokens = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
        embeddings = {
            path: LinearShape(module.num_embeddings, module.embedding_dim)
            for path, module in model.named_modules()
            if module is tokens and isinstance(module, nn.Embedding)
        }
        prefix = getattr(model, "base_model_prefix", "")
        return cls(shapes, _WRAPPERS | ({prefix} if prefix else set()), embeddings=embeddings, uncalled=uncalled)

    def embedding(self, path: str) -> list[str]:
        """The embeddings that `path` may mean."""
        core = core_path(path, self.wrappers)
        return [own for own in self.embeddings if core_path(own, self.wrappers) == core]

    def matches(self, path: str) -> list[str]:
        """The linear modules that `path` may mean: the longest dotted suffix, up to wrapper segments in front.

        Everything below the wrappers has to agree, so layer 30 of one model never matches layer 3 of another.
        """
        if path in self.shapes:
            return [path]
        candidates = self._by_core.get(core_path(path, self.wrappers), [])
        backwards = path.split(".")[::-1]
        alike = [len(commonprefix([backwards, candidate.split(".")[::-1]])) for candidate in candidates]  # noqa: RUF071
        return [candidate for candidate, count in zip(candidates, alike, strict=True) if count == max(alike)]

    @cached_property
    def _by_core(self) -> dict[str, list[str]]:
        paths: dict[str, list[str]] = {}
        for path in self.shapes:
            paths.setdefault(core_path(path, self.wrappers), []).append(path)
        return paths


def core_path(path: str, wrappers: frozenset[str] = _WRAPPERS) -> str:
    """A module path without the wrappers in front, by which paths from different adapters are compared."""
    segments = path.split(".")
    while len(segments) > 1 and segments[0] in wrappers:
        segments = segments[1:]
    return ".".join(segments)
