"""Evidence: what says that an adapter was made for a prompt, and one score of all that there is.

An adapter is scored by up to three kinds of evidence, each in units of how far apart it lies on ordinary texts:

    r    its response to the prompt                            always             `logo.selection.reference`
    s    how similar the prompt is to its example prompts,     if it has some     `logo.selection.examples`
         as the base model reads them
    e    how similar it is to these and to its description,    if it has some,    `logo.selection.encoder`
         as a text encoder reads them                          and one is named

    score_i = RESPONSE r_i + s_i + e_i

What an adapter lacks is estimated from its response, so that all scores are on one scale:

    s_j = s̄ + r_j - r̄        s̄, r̄: means over the adapters that have it, the best of them left out

where s̄ counts `FEW_KNOWN` adapters more, with evidence 0, as ordinary texts have. If a call names candidates, the means
are those of the candidates alone. If no adapter has any, `s_j = r_j - r̄`; if nothing is said of any adapter, the score
is the response.
docs/how-selection-works.md has the measurements behind this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["responses", "examples", "encoder"]  # r, s, e
KINDS: tuple[Kind, ...] = ("responses", "examples", "encoder")
# The weight of responses: example prompts say more (docs/how-selection-works.md).
RESPONSE = 0.5
# The mean s̄ counts this many adapters more, each with evidence 0: of few adapters, a mean alone says little.
FEW_KNOWN = 4


@dataclass(frozen=True)
class Similarities:
    """Evidence from example prompts.

    Attributes:
        values: (rows, adapters that have it), in units of how far apart it lies on ordinary texts.
        known: (adapters,) bool, in pool order: those that have it.
    """

    values: Tensor
    known: Tensor

    @classmethod
    def none(cls, rows: int, adapters: int) -> Similarities:
        """Those of adapters that have no evidence of a kind."""
        return cls(torch.zeros(rows, 0), torch.zeros(adapters, dtype=torch.bool))

    @classmethod
    def of_row(cls, values: Sequence[float | None]) -> Similarities:
        """Those of one row, for all adapters in pool order; None: an adapter has none."""
        found = [value for value in values if value is not None]
        return cls(torch.tensor([found]), torch.tensor([value is not None for value in values]))

    def rows(self) -> list[tuple[float | None, ...]]:
        """The values of each row, as `of_row` takes them."""
        at = self.known.nonzero()[:, 0].tolist()
        rows = []
        for values in self.values.tolist():
            found = dict(zip(at, values, strict=True))
            rows.append(tuple(found.get(adapter) for adapter in range(len(self.known))))
        return rows

    def among(self, row: int, columns: Tensor) -> Similarities:
        """Those of one row, and of some adapters (adapters,) bool."""
        return Similarities(self.values[row : row + 1, columns[self.known]], self.known[columns])

    def complete(self, responses: Tensor) -> Tensor:
        """(rows, adapters): with an estimate for the adapters that have none, from responses (rows, adapters)."""
        if self.known.all():
            return self.values
        estimated = responses - responses.mean(dim=1, keepdim=True)
        if not self.known.any():
            return estimated
        others = self.values.shape[1] - 1
        best = self.values.argmax(dim=1, keepdim=True)
        level = responses.mean(dim=1)
        if others:
            own = responses[:, self.known]
            level = (own.sum(dim=1) - own.gather(1, best)[:, 0]) / others
        unrelated = (self.values.sum(dim=1) - self.values.gather(1, best)[:, 0]) / (others + FEW_KNOWN)
        estimated = (unrelated - level)[:, None] + responses
        estimated[:, self.known] = self.values
        return estimated


def together(responses: Tensor, evidence: Sequence[Similarities], selectable: Tensor | None = None) -> Tensor:
    """Scores (rows, adapters) of all evidence together.

    Args:
        responses: (rows, adapters), in units of how far apart they lie on ordinary texts.
        evidence: what there is beside them.
        selectable: (rows, adapters) bool: which may be selected (None: all); others get -inf.
    """
    if selectable is None:
        total = RESPONSE * responses
        for kind in evidence:
            total = total + kind.complete(responses)
        return total
    scores = torch.full_like(responses, -torch.inf)
    for row, columns in enumerate(selectable):
        of_row = [kind.among(row, columns) for kind in evidence]
        scores[row, columns] = together(responses[row : row + 1, columns], of_row)[0]
    return scores
