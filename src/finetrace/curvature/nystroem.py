"""The randomised Nystroem approximation of the empirical Fisher, and the preconditioner that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetrace.curvature.passes import through_rows
from finetrace.curvature.train_rows import TrainRows


@dataclass(frozen=True, eq=False)
class Sketch:
    """U diag(values) U^T for every segment: the randomised Nystroem approximation of F.

    Frangella, Tropp and Udell, arXiv 2110.02820, Algorithm 2.1.

    Attributes:
        vectors: (k, D) the rows of U^T, orthonormal in every segment.
        values: (k, S) eigenvalues, largest first; 0 beyond what a segment's width allows.
    """

    vectors: Tensor
    values: Tensor

    def precondition(self, residual: Tensor, damping: Tensor, segments: Sequence[slice]) -> Tensor:
        """(m, D) (lambda + l_k) U (L + lambda)^{-1} U^T r + (I - U U^T) r."""
        result = residual.clone()
        for k, s in enumerate(segments):
            if float(damping[k]) <= 0:
                continue
            basis, values = self.vectors[:, s], self.values[:, k]
            inner = residual[:, s] @ basis.T  # (m, k)
            result[:, s] += (inner * ((values[-1] + damping[k]) / (values + damping[k]) - 1)) @ basis
        return result


def nystroem(rows: TrainRows, rank: int, seed: int = 0) -> Sketch:
    """A sketch of every segment, in one pass; the start is fixed, so that scores do not change from run to run."""
    generator = torch.Generator().manual_seed(seed)
    width = rows.segments[-1].stop
    test = torch.zeros(rank, width, dtype=torch.float64)
    for s in rows.segments:
        most = min(rank, s.stop - s.start)
        drawn = torch.randn(s.stop - s.start, most, generator=generator, dtype=torch.float64)
        test[:most, s] = torch.linalg.qr(drawn)[0].T
    test = test.to(rows.device)
    image = through_rows(rows, test)  # (k, D) F Omega
    vectors = torch.zeros_like(test)
    values = torch.zeros(rank, len(rows.segments), dtype=torch.float64, device=rows.device)
    noise = torch.finfo(rows.dtype).eps
    for k, s in enumerate(rows.segments):
        most = min(rank, s.stop - s.start)
        omega, shifted = test[:most, s].T, image[:most, s].T  # (d, k)
        shift = noise * float(shifted.norm())
        if shift == 0:
            continue
        shifted = shifted + shift * omega
        core = omega.T @ shifted
        core = (core + core.T) / 2
        factor, failed = torch.linalg.cholesky_ex(core)
        if int(failed):
            continue  # no sketch of this segment: plain conjugate gradients there
        half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T  # (d, k)
        left, singular, _ = torch.linalg.svd(half, full_matrices=False)
        values[:most, k] = (singular.square() - shift).clamp_min(0)
        vectors[:most, s] = left.T
    return Sketch(vectors, values)
