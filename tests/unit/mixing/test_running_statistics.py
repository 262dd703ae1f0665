from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import ray_soup
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.progress import drain
from ray_soup.mixing.recalibration import summed, tracking_layers
from ray_soup.mixing.running_statistics import Statistics, averaged, buffers_of
from tests import tiny


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


def test_layers_that_are_not_chosen_stay_as_they_are_while_the_others_are_estimated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)).eval()
    model[0].running_mean.fill_(0.5)
    model[0].running_var.fill_(4.0)
    batches = [torch.randn(8, 3) for _ in range(5)]
    found = averaged([drain(summed(model, batches, lambda batch: batch, ["2"]))])
    hidden = torch.stack([torch.tanh((batch - 0.5) / (4 + 1e-5) ** 0.5) for batch in batches])
    expected = {
        "running_mean": hidden.mean((0, 1)),
        "running_var": hidden.var(1).mean(0),
        "num_batches_tracked": torch.tensor(5),
    }
    assert_same(found, {f"2.{name}": tensor for name, tensor in expected.items()})
    assert model[0].running_mean.eq(0.5).all()
    assert not any(module.training for module in model.modules())


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


@pytest.fixture(scope="module")
def partly_frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a zoo whose last BatchNorm layer was in eval mode while the models were fine-tuned."""
    folder = tmp_path_factory.mktemp("frozen")
    tiny.write_data(folder)
    images, labels = (torch.from_numpy(a[:600]) for a in tiny.digits())
    torch.manual_seed(0)
    trunk = tiny.build_conv()
    trunk.norm1d.train = lambda mode=True: trunk.norm1d.requires_grad_()  # as many recipes freeze it
    trunk.norm1d.training = False
    tiny.train(trunk, 0, 5e-3, 6, images, labels)
    for k in range(3):
        model = copy.deepcopy(trunk)
        tiny.train(model, k + 1, 2e-3, 2, images, labels)
        torch.save(model.state_dict(), folder / f"{k}.pt")
    return folder


@pytest.mark.parametrize("method", ["uniform", "mehl+", pytest.param("greedy", marks=pytest.mark.slow)])
def test_a_frozen_layer_of_a_soup_keeps_its_statistics(partly_frozen: Path, method: str) -> None:
    arrays = {name: np.load(partly_frozen / f"{name}.npz") for name in ("heldout", "test")}
    data = {n: [(torch.from_numpy(a["images"]), torch.from_numpy(a["labels"]))] for n, a in arrays.items()}
    states = [torch.load(partly_frozen / f"{k}.pt", weights_only=True) for k in range(3)]
    assert all(torch.equal(state["norm1d.running_var"], states[0]["norm1d.running_var"]) for state in states)

    def soup_with(buffers: str) -> ray_soup.MixedSoup:
        options = {"learn": {"epochs": 2, "batch_size": 100}, "precision": "float32", "buffers": buffers}
        return ray_soup.mix_state_dicts(tiny.build_conv(), states, data["heldout"], method, test=data["test"], **options)

    soup, all_again = soup_with("auto"), soup_with("recalibrate")
    made = soup.state_dict()
    for mixed, layers in ((soup, ["norm"]), (all_again, ["norm", "norm1d"])):
        if len(mixed.coefficients.used()) > 1:
            assert set(mixed.coefficients.statistics) == set(buffers_of(layers))
    assert all(torch.equal(made[name], states[0][name]) for name in buffers_of(["norm1d"]))
    assert soup.figures["test_nll"] < all_again.figures["test_nll"] - (0.02 if method != "greedy" else 0)
    model = tiny.build_conv().eval()
    model.load_state_dict(made)
    nll = F.cross_entropy(model(data["test"][0][0]), data["test"][0][1]).item()
    assert abs(nll - soup.figures["test_nll"]) < 1e-5
    if method == "mehl+":  # the point was chosen with the same statistics that the soup has
        best = min(line["select_nll"] for line in soup.record["curve"])
        assert abs(best - soup.figures["select_nll"]) < 0.05
