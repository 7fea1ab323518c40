"""LoGo's part of replies: of answers, of selections, and of the lists of models and adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from logo.adapters.adapter import Adapter
from logo.core import Selection

if TYPE_CHECKING:
    from logo.selection.settings import SelectionSettings

Role = Literal["auto", "base", "adapter"]
# Settings of the selection that clients are not told: prompts and paths of the operator, and k, which has a default.
_PRIVATE = ("calibration_prompts", "cache", "encoder", "k")


@dataclass(frozen=True)
class Chosen:
    """The mixture for one prompt, selected or named by its request.

    Attributes:
        selection: the adapters with their weights, best first; none: the base model alone.
        probe_ms: how long the probe took, which prompts may share; 0: nothing was probed.
        queue_ms: how long the prompt waited for it.
    """

    selection: Selection
    probe_ms: float = 0.0
    queue_ms: float = 0.0

    def reply(self) -> dict[str, Any]:
        """Field `logo` of a reply. `confidence` is the probability that the pool holds an adapter made for the prompt;
        None: it is unknown."""
        return {
            "adapters": list(self.selection.adapters),
            "weights": list(self.selection.weights),
            "confidence": self.selection.confidence,
            "probe_ms": round(self.probe_ms, 3),
            "queue_ms": round(self.queue_ms, 3),
        }

    def reply_with_scores(self, tokens: int) -> dict[str, Any]:
        """Answer of `POST /v1/logo/select` for a prompt of so many tokens: also the score of every adapter (none for a
        mixture that the request names)."""
        return {**self.reply(), "scores": self.selection.scores, "tokens": tokens}


def labels(selection: Selection, base: str) -> list[dict[str, Any]]:
    """Answer of `POST /classify`, the likeliest first: the probability of each adapter that it was made for the text,
    and, under the name of the base model, that none was. They sum to 1."""
    probabilities = selection.probabilities
    none = 1.0 - sum(probabilities.values())
    scores = {**probabilities, base: max(0.0, none)}
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in ranked]


def model_card(name: str, role: Role, base: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `GET /v1/models` says of a name that requests may give as `model`: beside what is said `about` all of them,
    an adapter's root is itself and its parent the base model; what `logo` selects from has no parent."""
    lineage = {"root": name, "parent": base} if role == "adapter" else {"root": base, "parent": None}
    return {**about, "id": name, **lineage, "logo": {"role": role}}


def adapter_card(adapter: Adapter) -> dict[str, Any]:
    """What users see of an adapter; `targets` are the last parts of the names of its modules. Reads its file's size."""
    return {
        "id": adapter.name,
        "rank": max(adapter.ranks),
        "parameters": adapter.parameters,
        "modules": len(adapter.modules),
        "targets": sorted({path.rpartition(".")[2] for path in adapter.modules}),
        "size_bytes": adapter.size,
    }


def adapter_list(
    base: str,
    k: int,
    signals: Sequence[str],
    settings: SelectionSettings,
    cards: Iterable[Mapping[str, Any]],
    selected: Counter[str] | None,
) -> dict[str, Any]:
    """Answer of `GET /v1/logo/adapters`: the cards of adapters with how often each was `selected` since the server
    started (None: the client is not told), the signals that requests may ask for, the usual one first, and how the
    server selects, but for what is the operator's alone."""
    if selected is not None:
        cards = [{**card, "selected": selected[card["id"]]} for card in cards]
    return {
        "object": "list",
        "base_model": base,
        "default_k": k,
        "signal": signals[0],
        "signals": list(signals),
        "settings": {name: setting for name, setting in vars(settings).items() if name not in _PRIVATE},
        "has_own_calibration_prompts": settings.calibration_prompts is not None,
        "data": list(cards),
    }
