"""Spectral normalization: its buffers are functions of a weight, recomputed for the soup's own weight.

    effective weight = W / sigma,    sigma = u^T W v = the largest singular value of W

torch keeps the singular vectors u and v as buffers and updates them by one power iteration per training step (Miyato et al.
2018). The mean of several singular vectors is not a singular vector: sigma comes out too small, and the weight too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_soup.io.lazy import torch

DENSE = 64  # up to this many rows or columns, a dense eigenproblem is as fast as Lanczos iterations


@dataclass(frozen=True)
class SpectralNorm:
    """A weight that is divided by its largest singular value, and the buffers of its singular vectors."""

    weight: str
    """Name of the parameter."""
    u: str
    """Name of the buffer of the left singular vector, [rows]."""
    v: str
    """Name of the buffer of the right singular vector, [columns]."""
    dim: int
    """The dimension of the weight that becomes the rows of the matrix."""


def spectral_norms(model: torch.nn.Module) -> tuple[SpectralNorm, ...]:
    """Find the weights of `model` under `torch.nn.utils.spectral_norm` or its parametrization."""
    return tuple(_found(model))


def _found(model: torch.nn.Module) -> Iterator[SpectralNorm]:
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.nn.utils.parametrize import ParametrizationList
    from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook

    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _SpectralNormHook):
                kept = prefix + hook.name
                yield SpectralNorm(f"{kept}_orig", f"{kept}_u", f"{kept}_v", hook.dim)
        first = module[0] if isinstance(module, ParametrizationList) else None
        if isinstance(first, _SpectralNorm) and hasattr(first, "_u"):
            yield SpectralNorm(f"{prefix}original", f"{prefix}0._u", f"{prefix}0._v", first.dim)


def singular_vectors(weight: torch.Tensor, dim: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the first singular vectors of a weight, seen as a matrix with dimension `dim` as its rows, in float64.

    They depend on the weight alone. Those of a weight with NaN or inf are NaN; those of zeros are unit vectors, and torch,
    which divides by sigma, makes NaN of such a weight.

    Returns:
        u float64 [rows], v float64 [columns].
    """
    wide = weight.detach().to("cpu", torch.float64).movedim(dim, 0).flatten(1).numpy()
    if not np.isfinite(wide).all():
        return np.full(wide.shape[0], np.nan), np.full(wide.shape[1], np.nan)
    low = wide if wide.shape[0] <= wide.shape[1] else wide.T
    short = _top_eigenvector(low @ low.T)
    long = low.T @ short
    if not long.any():
        long[0] = 1
    long /= float(np.linalg.norm(long))
    return (short, long) if low is wide else (long, short)


def _top_eigenvector(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the eigenvector of the largest eigenvalue, float64 [n] of float64 [n, n]."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackError, eigsh

    n = len(gram)
    vectors: NDArray[np.float64]
    if n > DENSE:
        with suppress(ArpackError):  # of zeros
            vectors = eigsh(gram, k=1, which="LA", v0=np.random.default_rng(0).normal(size=n), tol=0)[1]
            return vectors[:, 0]
    vectors = eigh(gram, subset_by_index=[n - 1, n - 1])[1]
    return vectors[:, 0]


def update_singular_vectors(model: torch.nn.Module, norms: Iterable[SpectralNorm]) -> None:
    """Set the singular vectors in `model` to those of its weights."""
    for norm in norms:
        found = singular_vectors(model.get_parameter(norm.weight), norm.dim)
        for name, vector in zip((norm.u, norm.v), found, strict=True):
            model.get_buffer(name).copy_(torch.from_numpy(vector))
