"""Re-estimation of the running statistics of BatchNorm and related layers for a soup.

    mean = 1/n sum_i mean_i        var = 1/n sum_i var_i        i: n batches; var_i unbiased

as torch computes them with momentum=None (`torch.optim.swa_utils.update_bn`; Izmailov et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ray_soup.errors import RecipeError
from ray_soup.mixing.running_statistics import Sums, buffers_of

B = TypeVar("B")


class _LocalBatchNorm(_BatchNorm):
    """Stands in for SyncBatchNorm, which would communicate with other processes and does not run on a CPU."""

    def _check_input_dim(self, input: torch.Tensor) -> None: ...


def tracking_layers(model: torch.nn.Module) -> dict[str, _NormBase]:
    """Return the layers of `model` that track running statistics, under all their names."""
    layers = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in layers if isinstance(layer, _NormBase) and layer.running_mean is not None}


def summed(
    model: torch.nn.Module,
    batches: Sequence[B],
    images_of: Callable[[B], Any],
    chosen: Collection[str] | None = None,
    run: Callable[[Any], Any] | None = None,
) -> Generator[tuple[int, int], None, Sums]:
    """Sum each batch's statistics over the batches.

    Yields (batches done, batches in total); the value of the generator is the sums. Meanwhile only the chosen layers are
    in training mode. Their buffers contain meaningless values afterwards.

    Args:
        model: the model, in eval mode.
        batches: the batches.
        images_of: returns the model's input for a batch, [n, ...].
        chosen: names of the layers to estimate, of those that track running statistics; None: all of them.
        run: runs the model on its input; None: the model itself.

    Raises RecipeError if a layer sees a single value per channel.
    """
    layers = {name: layer for name, layer in tracking_layers(model).items() if chosen is None or name in chosen}
    sums: dict[str, Any] = dict.fromkeys(buffers_of(layers), 0.0)
    before = {id(layer): (layer, type(layer), layer.training, layer.momentum) for layer in layers.values()}
    for layer, kind, _, _ in before.values():
        if kind is SyncBatchNorm:
            layer.__class__ = _LocalBatchNorm
        layer.train()
        layer.momentum = None if isinstance(layer, _BatchNorm) else 1.0  # InstanceNorm treats None as 0
    try:
        for done, batch in enumerate(batches):
            for layer, *_ in before.values():
                layer.reset_running_stats()
            with torch.inference_mode():
                (run or model)(images_of(batch))
                for name, layer in layers.items():
                    _add_statistics(sums, name, layer)
            yield done + 1, len(batches)
    except ValueError as error:
        raise RecipeError(
            f"buffers: running statistics cannot be estimated from batches this small ({error}). Raise learn.batch_size, "
            "add examples to data.fit, or set buffers: average."
        ) from error
    finally:
        for layer, kind, training, momentum in before.values():
            layer.__class__, layer.training, layer.momentum = kind, training, momentum
    return {name: np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value) for name, value in sums.items()}


def _add_statistics(sums: dict[str, Any], name: str, layer: _NormBase) -> None:
    """Add the statistics that a layer has just tracked to the sums."""
    mean, var, count = buffers_of([name])
    assert layer.running_mean is not None
    assert layer.running_var is not None
    times = 1
    if isinstance(layer, _BatchNorm):
        assert layer.num_batches_tracked is not None
        times = int(layer.num_batches_tracked)  # more than 1 for a layer that the model uses several times
    sums[mean] += times * layer.running_mean.double()
    sums[var] += times * layer.running_var.double()
    sums[count] += times
