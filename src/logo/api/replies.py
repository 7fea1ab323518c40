"""LoGo's part of replies, for our own server and for vLLM: the adapters and their weights; and the replies of LoGo's
own routes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from logo.protocol import Card, SelectedMixture

_CONFIDENCE = "The probability that the pool holds an adapter made for the prompt; null where nothing is known of it."


class Reply(BaseModel):
    """What every object of an answer shares. Fields with `exclude_if` are left out rather than null."""

    model_config = ConfigDict(extra="forbid")


class Mixture(Reply):
    """Top-level `logo` of a reply: the mixture that answered the prompt."""

    adapters: list[str] = Field(description="Best first; empty: the base model alone.")
    weights: list[float] = Field(description="Parallel to 'adapters'.")
    confidence: float | None = Field(description=_CONFIDENCE)
    probe_ms: float = Field(description="How long the selection took.")
    queue_ms: float = Field(description="How long the request waited for a place.")

    @classmethod
    def of(cls, chosen: SelectedMixture) -> Mixture:
        """The mixture that was selected for a prompt."""
        return cls(
            adapters=list(chosen.selection.adapters),
            weights=list(chosen.selection.weights),
            confidence=chosen.selection.confidence,
            probe_ms=round(chosen.probe_ms, 3),
            queue_ms=round(chosen.queue_ms, 3),
        )


class ModelRole(Reply):
    """The meaning of a model id: the prompt selects, the base model alone, or one adapter."""

    role: Literal["auto", "base", "adapter"]


class SelectionReply(Reply):
    """Answer of `POST /v1/logo/select`."""

    adapters: list[str] = Field(description="Best first.")
    weights: list[float]
    scores: dict[str, float] = Field(description="Of every adapter, in pool order; empty for a forced mixture.")
    confidence: float | None = Field(description=_CONFIDENCE)
    probe_ms: float
    tokens: int = Field(description="Of the prompt.")

    @classmethod
    def of(cls, chosen: SelectedMixture, tokens: int) -> SelectionReply:
        """The reply about the selection for a prompt of `tokens` tokens."""
        return cls(
            adapters=list(chosen.selection.adapters),
            weights=list(chosen.selection.weights),
            scores=dict(chosen.selection.scores),
            confidence=chosen.selection.confidence,
            probe_ms=round(chosen.probe_ms, 3),
            tokens=tokens,
        )


class AdapterCard(Reply):
    """The description of an adapter on the page."""

    id: str
    rank: int = Field(description="The largest of its modules.")
    parameters: int
    modules: int
    targets: list[str] = Field(description="Last parts of the names of its modules, each once.")
    size_bytes: int
    selected: int = Field(description="How often it was selected since the server started.")

    @classmethod
    def of(cls, card: Card, selected: int) -> AdapterCard:
        """The reply about an adapter, from its card and the number of its selections."""
        return cls(
            id=card.name,
            rank=card.rank,
            parameters=card.parameters,
            modules=card.modules,
            targets=list(card.targets),
            size_bytes=card.size_bytes,
            selected=selected,
        )


class AdapterList(Reply):
    """Answer of `GET /v1/logo/adapters`."""

    object: Literal["list"] = "list"
    base_model: str
    default_k: int
    signal: str
    signals: list[str] = Field(description="What requests may give as 'signal'.")
    data: list[AdapterCard]


class ErrorBody(Reply):
    """The error: for people (`message`), for programs (`type`, `code`), and its field (`param`)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(Reply):
    """Every answer that is not a success."""

    error: ErrorBody
