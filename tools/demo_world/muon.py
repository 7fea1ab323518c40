"""A small momentum optimizer with orthogonalised updates for weight matrices (the Muon method), in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of ``matrix`` [..., rows, columns] towards one with a quintic Newton iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-2, -1) if tall else x


class Muon:
    """Updates a list of matrices with Nesterov momentum and orthogonalised steps of size ``rate``.

    Matrices of one shape are stacked, so that a few batched products replace many small ones.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        self.rate = rate
        self._momentum = momentum
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            self._groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self._buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Apply one update and clear the gradients; every matrix must have one."""
        for shape, group in self._groups.items():
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            buffer = self._buffers[shape]
            buffer.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(buffer, self._momentum))
            scale = self.rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                matrix.mul_(1 - 0.02 * self.rate).sub_(change, alpha=scale)
                matrix.grad = None
