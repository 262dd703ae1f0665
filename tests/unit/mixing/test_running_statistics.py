from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.progress import drain
from ray_soup.mixing.running_statistics import Statistics, averaged, buffers_of, summed, tracking_layers


def statistics_by_torch(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn(batches, model)
    return {name: tensor for name, tensor in model.state_dict().items() if name in buffers_of(tracking_layers(model))}


def assert_same(found: Statistics, expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, array in found.items():
        torch.testing.assert_close(torch.from_numpy(array), expected[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 3, 2, 4, 4), (5, 3)])
def test_statistics_are_those_of_update_bn(shape: tuple[int, ...], parts: int) -> None:
    torch.manual_seed(0)
    norm: nn.Module = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d, 2: nn.BatchNorm1d}[len(shape)](3)
    twice = nn.SyncBatchNorm(3)  # used twice, under two names
    model = nn.ModuleDict({"norm": norm, "first": twice, "second": twice, "dropout": nn.Dropout(0.5)})
    model.forward = lambda x: model["dropout"](model["second"](model["first"](model["norm"](x)) ** 2))
    batches = [torch.randn(shape) * (i + 1) for i in range(7)]
    model.eval()
    before = {name: tensor.clone() for name, tensor in norm.named_parameters()}
    sums = [drain(summed(model, batches[part::parts], lambda batch: batch)) for part in range(parts)]
    found = averaged(sums)
    assert not any(module.training for module in model.modules())
    assert type(twice) is nn.SyncBatchNorm
    assert norm.momentum == 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.named_parameters())
    assert found["norm.num_batches_tracked"] == 7
    assert found["second.num_batches_tracked"] == 14
    for module in model.values():
        module.training = True
    assert_same(found, statistics_by_torch(model, batches))


def test_progress_counts_batches() -> None:
    batches = [torch.randn(4, 3) for _ in range(3)]
    assert list(summed(nn.BatchNorm1d(3), batches, lambda batch: batch)) == [(1, 3), (2, 3), (3, 3)]


def test_instance_norm_averages_over_instances() -> None:
    norm, images = nn.InstanceNorm2d(3, track_running_stats=True).eval(), torch.randn(4, 3, 5, 5)
    found = averaged([drain(summed(norm, images.split(2), lambda batch: batch))])
    assert_same(
        found,
        {
            "running_mean": images.mean(dim=(0, 2, 3)),
            "running_var": images.var(dim=(2, 3)).mean(dim=0),
            "num_batches_tracked": torch.tensor(2),
        },
    )


def test_a_batch_of_one_image_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"batches this small .* Raise learn\.batch_size"):
        drain(summed(nn.BatchNorm1d(3), [torch.zeros(1, 3)], lambda batch: batch))


def test_a_layer_that_saw_no_image_is_omitted_and_infinite_statistics_are_refused() -> None:
    def sums(mean: float, count: float) -> dict[str, np.ndarray]:
        names = buffers_of(["norm"])
        return dict(zip(names, (np.full(2, mean), np.ones(2), np.asarray(count)), strict=True))

    assert averaged([sums(0.0, 0.0)]) == {}
    with pytest.raises(SoupError, match=r"norm\.running_mean is not finite.*Lower learn\.lr"):
        averaged([sums(1.0, 1.0), sums(float("inf"), 1.0)])
