"""Candidates: mixtures of ingredients that are put into the model to be evaluated, without being written.

Those of a greedy search are means, computed from a running sum; others have any weights, and are mixed as `bake` mixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ray_soup.actors.replica import Replica
from ray_soup.io.check import common_dtype
from ray_soup.io.formats import dtype_of
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import drain
from ray_soup.mixing.bake import as_tensor, mix_range, written_dtype
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
        self._recalibrate(calibration)

    def mix_weighted(self, weights: np.ndarray, calibration: Sequence[Split] = ()) -> None:
        """Set the model to sum_k weights[k] theta_k, bit for bit as `bake` writes it.

        Args:
            weights: float64 [K], one for each ingredient; they sum to 1.
            calibration: as for `mix`; a mixture of a single ingredient keeps that ingredient's statistics.
        """
        self.forget()  # the sum of a search
        used = np.flatnonzero(weights).tolist()
        chosen, out_dtype = [self._ingredients[k] for k in used], self._replica.recipe.out_dtype

        def mixed(name: str, numel: int) -> torch.Tensor:
            dtype = written_dtype(self._ingredients, name, out_dtype)
            return as_tensor(mix_range(chosen, name, weights[used], 0, numel, dtype))

        if self._replica.layers is not None:
            self._replica.layers.use_tensors(mixed)
        else:
            for name, start, stop in self._replica.layout.spans():
                self._replica.theta[start:stop] = mixed(name, stop - start)
        self._mix_buffers(chosen)
        for ingredient in chosen:
            ingredient.close()
        self._recalibrate(calibration if len(chosen) > 1 else ())

    def _recalibrate(self, calibration: Sequence[Split]) -> None:
        """Re-estimate the running statistics on these batches, if there are any."""
        if calibration:
            found = averaged([drain(self._replica.sum_statistics(list(calibration)))])
            self._replica.copy_buffers({name: torch.from_numpy(values) for name, values in found.items()})

    def _mix(self, kept: tuple[int, ...], candidate: int) -> None:
        """Set theta = (sum of kept + candidate) / (len(kept) + 1), in float64, then rounded as `bake` does."""
        if self._replica.layers is not None:
            self._replica.layers.use_mean([self._ingredients[k] for k in (*kept, candidate)])
        else:
            self._hold_mean(kept, candidate)
        self._mix_buffers([self._ingredients[k] for k in sorted((*kept, candidate))])  # the first one decides, as in `bake`
        self._mixed = (kept, candidate)

    def _hold_mean(self, kept: tuple[int, ...], candidate: int) -> None:
        """Write the mean into the parameter vector, and keep the sum for the next candidate."""
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
            self._replica.theta[start:stop] = mean.to(dtype_of(common_dtype(chosen, name)))

    def _mix_buffers(self, chosen: Sequence[Ingredient]) -> None:
        """Set the buffers of the model for a mixture of the ingredients `chosen`, after its parameters."""
        layout, policy = self._replica.layout, self._replica.recipe.buffers
        self._replica.copy_buffers({name: mixed_buffer(chosen, name, policy) for name in layout.mixed_buffers})
        self._replica.theta_changed()

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
