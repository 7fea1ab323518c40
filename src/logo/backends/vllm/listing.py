"""The pool in replies over HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from logo.backends.vllm.core import Core
from logo.serve.bodies import AdapterCard, AdapterList, Card
from logo.serve.names import AUTO


def adapter_list(core: Core, base: str, selected: Mapping[str, int]) -> AdapterList:
    """Answer of `GET /v1/logo/adapters`."""
    cards = [AdapterCard.of(Card.of(adapter), selected.get(adapter.name, 0)) for adapter in core.pool.adapters]
    signals = list(core.signals)
    return AdapterList(base_model=base, default_k=core.k, signal=signals[0], signals=signals, data=cards)


def model_cards(core: Core, base: str, listed: Sequence[Any]) -> list[dict[str, Any]]:
    """The list of `GET /v1/models`: vLLM's models, base models with their role; the model `logo`; and every adapter."""
    own = [{**card, "logo": {"role": "base"}} if card.get("parent") is None else card for card in listed]
    known = {card.get("id") for card in listed if isinstance(card, Mapping)}
    created, longest = int(time.time()), next((card.get("max_model_len") for card in listed), None)

    def card(name: str, role: str) -> dict[str, Any]:
        parent = base if role == "adapter" else None
        about = {"id": name, "object": "model", "created": created, "owned_by": "logo", "root": base, "parent": parent}
        return {**about, "max_model_len": longest, "permission": [], "logo": {"role": role}}

    names = [(AUTO, "auto"), *((name, "adapter") for name in core.pool.keys)]
    return [*own, *(card(name, role) for name, role in names if name not in known)]
