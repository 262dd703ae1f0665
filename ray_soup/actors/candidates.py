"""Candidates of a greedy search: means of ingredients, computed from a running sum and put into the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ray_soup.actors.replica import Replica
from ray_soup.io.check import common_dtype
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import drain
from ray_soup.mixing.buffers import mixed_buffer
from ray_soup.mixing.running_statistics import averaged
from ray_soup.task.data import Split


class CandidateMixer:
    """Puts the mean of some ingredients and one candidate into the replica's model.

    The sum of the ingredients is kept between calls, so that a search reads each ingredient once.
    """

    def __init__(self, replica: Replica, ingredients: Sequence[Ingredient]) -> None:
        self._replica, self._ingredients = replica, ingredients
        self._summed: tuple[int, ...] = ()
        self._mixed: tuple[tuple[int, ...], int] | None = None
        self._sum = self._candidate = torch.empty(0)

    def mix(self, kept: tuple[int, ...], candidate: int, calibration: Sequence[Split] = ()) -> None:
        """Set the model to the mean of the ingredients `kept` and `candidate`, unless the last call did so.

        If there are batches `calibration`, the running statistics are re-estimated on them.
        """
        if self._mixed == (kept, candidate):
            return
        self._mix(kept, candidate)
        if calibration:
            found = averaged([drain(self._replica.sum_statistics(list(calibration)))])
            self._replica.copy_buffers({name: torch.from_numpy(values) for name, values in found.items()})

    def _mix(self, kept: tuple[int, ...], candidate: int) -> None:
        """Set theta = (sum of kept + candidate) / (len(kept) + 1), in float64, then rounded as `bake` does."""
        if self._replica.layers is not None:
            self._replica.layers.use_mean([self._ingredients[k] for k in (*kept, candidate)])
            self._finish(kept, candidate)
            return
        if self._summed != kept:
            if self._summed == kept[:-1] and self._mixed == (kept[:-1], kept[-1]):
                self._sum += self._candidate
            else:
                self._sum = torch.zeros(self._replica.layout.numel, dtype=torch.float64)
                for k in kept:
                    self._sum += self._vector_of(k)
            self._summed = kept
        self._candidate = self._vector_of(candidate)
        count = len(kept) + 1
        chosen = [self._ingredients[k] for k in (*kept, candidate)]
        for name, start, stop in self._replica.layout.spans():
            mean = (self._sum[start:stop] + self._candidate[start:stop]) / count
            self._replica.theta[start:stop] = mean.to(common_dtype(chosen, name))
        self._finish(kept, candidate)

    def _finish(self, kept: tuple[int, ...], candidate: int) -> None:
        """Set the buffers."""
        layout, policy = self._replica.layout, self._replica.recipe.buffers
        chosen = [self._ingredients[k] for k in sorted((*kept, candidate))]  # the first one decides, as in `bake`
        self._replica.copy_buffers({name: mixed_buffer(chosen, name, policy) for name in layout.mixed_buffers})
        self._replica.update_computed_buffers()
        self._mixed = (kept, candidate)

    def _vector_of(self, k: int) -> torch.Tensor:
        """Read the parameter vector of ingredient k, float32 [N]."""
        vector = torch.empty(self._replica.layout.numel)
        for name, start, stop in self._replica.layout.spans():
            vector[start:stop] = self._ingredients[k].read(name).view(-1)
        self._ingredients[k].close()
        return vector

    def forget(self) -> None:
        """Free the sum and start over."""
        self._summed, self._mixed = (), None
        self._sum = self._candidate = torch.empty(0)
