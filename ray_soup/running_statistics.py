"""Running statistics of BatchNorm layers and their kin, computed anew for a soup.

    mean = 1/n sum_i mean_i        var = 1/n sum_i var_i        i: n batches; var_i unbiased

as torch computes them with momentum=None (`torch.optim.swa_utils.update_bn`). A soup's activations are not those of any
ingredient, so the mean of the ingredients' statistics does not fit them. Sums over parts of the batches add up: actors share
them, and the result does not depend on how many there are, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ray_soup.errors import RecipeError, SoupError

KEYS = ("running_mean", "running_var", "num_batches_tracked")
Statistics = dict[str, np.ndarray]
"""By buffer: running_mean and running_var float32 [channels], num_batches_tracked int64 []."""


class _Alone(_BatchNorm):
    """What a SyncBatchNorm is when it asks nobody else, and on a CPU."""

    def _check_input_dim(self, input: torch.Tensor) -> None: ...


def tracking_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers of `model` that keep running statistics, under all their names."""
    layers = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in layers if isinstance(layer, _NormBase) and layer.running_mean is not None}


def buffers_of(layers: Iterable[str]) -> list[str]:
    """The names of their buffers in a state dict."""
    return [f"{layer}.{key}" if layer else key for layer in layers for key in KEYS]


def summed(
    model: torch.nn.Module, batches: Sequence[Any], images_of: Callable[[Any], torch.Tensor]
) -> Generator[tuple[int, int], None, dict[str, np.ndarray]]:
    """Sums over the batches of each batch's statistics, and the number of batches, by the names of the buffers; float64.

    Yields (batches done, in all). Only these layers are in training mode meanwhile; their buffers are left with numbers of
    no use. Raises RecipeError where a layer sees a single value a channel.
    """
    layers = tracking_layers(model)
    sums: dict[str, Any] = dict.fromkeys(buffers_of(layers), 0.0)
    before = {id(layer): (layer, type(layer), layer.training, layer.momentum) for layer in layers.values()}
    for layer, kind, _, _ in before.values():
        if kind is SyncBatchNorm:
            layer.__class__ = _Alone
        layer.train()
        layer.momentum = None if isinstance(layer, _BatchNorm) else 1.0  # InstanceNorm takes None for 0
    try:
        for done, batch in enumerate(batches):
            for layer, *_ in before.values():
                layer.reset_running_stats()
            with torch.inference_mode():
                model(images_of(batch))
                for name, layer in layers.items():
                    mean, var, count = buffers_of([name])
                    times = int(layer.num_batches_tracked) if isinstance(layer, _BatchNorm) else 1  # type: ignore[arg-type]
                    sums[mean] += times * layer.running_mean.double()
                    sums[var] += times * layer.running_var.double()
                    sums[count] += times
            yield done + 1, len(batches)
    except ValueError as error:
        raise RecipeError(
            f"buffers: running statistics cannot be computed from so few images ({error}). Raise learn.batch_size, give "
            "more images in data.fit, or set buffers: average."
        ) from error
    finally:
        for layer, kind, training, momentum in before.values():
            layer.__class__, layer.training, layer.momentum = kind, training, momentum
    return {name: np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value) for name, value in sums.items()}


def averaged(parts: Sequence[dict[str, np.ndarray]]) -> Statistics:
    """Sums over parts of the batches, to statistics: added in order, divided by the number of batches once. A layer that no
    image went through is left out. Raises SoupError where they are not finite."""
    sums: dict[str, Any] = {name: sum(part[name] for part in parts) for name in parts[0]}
    found: Statistics = {}
    for layer in [name.removesuffix(KEYS[2]) for name in sums if name.endswith(KEYS[2])]:
        mean, var, count = (layer + key for key in KEYS)
        if sums[count] == 0:
            continue
        for name in (mean, var):
            found[name] = (sums[name] / sums[count]).astype(np.float32)
            if not np.isfinite(found[name]).all():
                raise SoupError(f"The soup's {name} is not finite: its activations are too large. Lower learn.lr.")
        found[count] = np.asarray(sums[count], dtype=np.int64)
    return found
