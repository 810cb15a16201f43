"""A dense matrix as an operator: what exact problems and tests are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.spectral import OrthogonalSpectrum, Spectrum


class MatrixOperator:
    """x -> A x for a matrix A, (M, D), on vectors, (N, D) -> (N, M), or on flattened events.

    It speaks the part of deepinv's `LinearPhysics` that the library uses, and gives its own singular vectors.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def A(self, x: Tensor) -> Tensor:
        """Return A x, (N, *event) -> (N, M)."""
        return x.flatten(1) @ self.matrix.to(x).T

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Return A' y, (N, M) -> (N, D)."""
        return y @ self.matrix.to(y)

    def spectrum(self, x: Tensor) -> Spectrum:
        """Return the singular value decomposition as a `Spectrum` on vectors like `x`, (N, D)."""
        _, values, vh = torch.linalg.svd(self.matrix.to(x), full_matrices=False)
        return OrthogonalSpectrum(values[None], lambda v: v @ vh.T, lambda c: c @ vh)
