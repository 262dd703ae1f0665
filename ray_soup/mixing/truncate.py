"""A product of two factors with a smaller rank: truncated singular value decomposition, from the small factors.

    B A = Q_B (R_B R_A^T) Q_A^T = (Q_B U) S (Q_A V)^T,    B' = Q_B U sqrt(S),  A' = sqrt(S) (Q_A V)^T,  the first R of each

in float64; the product itself is never formed. Of all products of rank R, this is the nearest to B A (Eckart and Young,
1936).

Shapes: r the rank of B A at most, R the rank asked for.
"""

from __future__ import annotations

from ray_soup.io.lazy import torch


def truncated(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Return the factors of the nearest product of a smaller rank.

    Args:
        b: float64 [outputs, r].
        a: float64 [r, inputs].
        rank: R, less than r.

    Returns:
        B' float64 [outputs, R], A' float64 [R, inputs], the squared Frobenius norm of what was left out, and that of B A.
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    new_b, new_a = torch.zeros(len(b), rank, dtype=b.dtype), torch.zeros(rank, a.shape[1], dtype=a.dtype)
    new_b[:, :kept] = (qb @ u[:, :kept]) * root
    new_a[:kept] = root[:, None] * (vt[:kept] @ qa.T)
    squares = s.square()
    return new_b, new_a, float(squares[kept:].sum()), float(squares.sum())


def distance(b: torch.Tensor, a: torch.Tensor, other_b: torch.Tensor, other_a: torch.Tensor) -> float:
    """Return the Frobenius norm of B A - B' A', from the factors, which are float64 as in `truncated`."""
    rb = torch.linalg.qr(torch.cat([b, -other_b], dim=1), mode="r").R
    ra = torch.linalg.qr(torch.cat([a, other_a]).T, mode="r").R
    return float(torch.linalg.norm(rb @ ra.T))
