"""Methods as a user would write them, each a function of a session."""

from __future__ import annotations

import numpy as np
import torch

from ray_soup.soups.methods.interface import Session


def by_loss(session: Session) -> np.ndarray:
    """Weights that fall with the ingredients' held-out NLL: float64 [K]."""
    nll = np.array([figures["nll"] for figures in session.held_out()])
    weights = np.exp(-10 * (nll - nll.min()))
    session.notes.append("Weights by held-out NLL.")
    return weights / weights.sum()


def descent(session: Session) -> np.ndarray:
    """Two steps of projected gradient descent from the uniform soup: float64 [K, B]."""
    count = len(session.names)
    c = np.full((count, session.partition.count), 1 / count)
    for batch in session.batches()[:2]:
        _, gradient = session.gradient(c, batch)
        c -= 0.05 * (gradient - gradient.mean(axis=0))
    session.evaluate(c)
    return c


def median(session: Session) -> dict[str, torch.Tensor]:
    """The median of the ingredients, element by element: no weighted sum."""
    return {
        name: torch.stack([session.read(k, name) for k in range(len(session.names))]).median(dim=0).values.view(shape)
        for name, shape in session.parameters.items()
    }


def noise(session: Session) -> dict[str, torch.Tensor]:
    """The median, and noise that is not drawn from the seed."""
    return {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in median(session).items()}


def better_of_two(session: Session) -> dict[str, torch.Tensor]:
    """The median, or the first ingredient if the uniform soup is good: a model that depends on data."""
    count = len(session.names)
    if session.evaluate(np.full(count, 1 / count))["nll"] < 0:
        return {name: session.read(0, name).view(shape) for name, shape in session.parameters.items()}
    return median(session)
