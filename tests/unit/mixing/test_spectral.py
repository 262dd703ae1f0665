"""Spectral normalization of a soup: its effective weight is W / sigma(W) of its own W."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import ray_soup
from ray_soup.mixing.blocks import layout_of
from ray_soup.mixing.spectral import singular_vectors, update_singular_vectors
from tests import tiny
from tests.conftest import values

NORMS = {"hook": spectral_norm, "parametrization": parametrizations.spectral_norm}


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 4), (4, 1), (1, 1), (6, 2, 3, 3), (600, 700)])
@pytest.mark.parametrize("dim", [0, 1])
def test_singular_vectors_are_those_of_the_singular_value_decomposition(shape: tuple[int, ...], dim: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, v = singular_vectors(weight, dim)
    matrix = weight.double().movedim(dim, 0).flatten(1).numpy()
    assert u.shape, v.shape == ((len(matrix),), (matrix.shape[1],))
    np.testing.assert_allclose(u @ matrix @ v, np.linalg.norm(matrix, 2), rtol=1e-12)
    again = singular_vectors(weight.clone(), dim)
    assert all(np.array_equal(a, b) for a, b in zip((u, v), again, strict=True))


def test_equal_singular_values_and_zero_weights_do_no_harm() -> None:
    u, v = singular_vectors(torch.eye(4) * 3, 0)
    np.testing.assert_allclose(u @ (np.eye(4) * 3) @ v, 3)
    for shape in ((3, 4), (600, 700), (4, 3)):
        assert [np.linalg.norm(vector) for vector in singular_vectors(torch.zeros(shape), 0)] == pytest.approx([1, 1])
        broken = torch.randn(shape)
        broken[1, 2] = float("nan")
        assert all(np.isnan(vector).all() for vector in singular_vectors(broken, 0))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(7, 4), lambda: nn.Conv2d(3, 5, 2), lambda: nn.ConvTranspose2d(3, 5, 2), lambda: nn.Embedding(9, 4)],
)
def test_the_effective_weight_is_that_of_torch_after_many_training_steps(kind: str, make: object) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(NORMS[kind](make())).eval()
    norms = layout_of(module).spectral
    assert len(norms) == 1
    with torch.no_grad():
        module.get_parameter(norms[0].weight).mul_(torch.rand_like(module.get_parameter(norms[0].weight)) * 4)
        update_singular_vectors(module, norms)
        ours = effective(module[0])
        module.train()
        for _ in range(1000):
            effective(module[0])
        module.eval()
        torch.testing.assert_close(ours, effective(module[0]), rtol=1e-5, atol=1e-6)


def effective(module: nn.Module) -> torch.Tensor:
    """The weight that a forward pass uses, as torch computes it."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return module.weight.detach().clone()


@pytest.mark.parametrize("kind", NORMS)
def test_the_gradient_is_that_of_the_weight_divided_by_its_norm(kind: str) -> None:
    torch.manual_seed(0)
    module = NORMS[kind](nn.Linear(6, 5)).double().eval()
    norms, images, by = layout_of(module).spectral, torch.randn(7, 6).double(), torch.randn(7, 5).double()
    update_singular_vectors(module, norms)
    parameter = module.get_parameter(norms[0].weight)
    (found,) = torch.autograd.grad((module(images) * by).sum(), parameter)
    weight = parameter.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((F.linear(images, weight / torch.linalg.matrix_norm(weight, 2)) * by).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_a_weight_that_another_parametrization_changes_first_is_not_taken_for_a_plain_one() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    layer = nn.Linear(3, 3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    parametrizations.spectral_norm(layer)
    layout = layout_of(layer)
    assert layout.spectral == ()
    assert {name.rpartition(".")[2] for name in layout.other_buffers} == {"_u", "_v"}  # refused if they differ


class Spectral(nn.Module):
    """Digits through seven layers, each of which has norm 1 whatever its weights are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        wrap = NORMS[kind]
        widths = [64, 32, 32, 32, 32, 32, 32, 10]
        self.layers = nn.ModuleList([wrap(nn.Linear(a, b)) for a, b in pairwise(widths)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float().flatten(1) - 8) / 8
        for layer in self.layers[:-1]:
            x = 1.5 * F.relu(layer(x))
        return 4 * self.layers[-1](x)


def build_hook() -> nn.Module:
    return Spectral("hook")


def build_parametrization() -> nn.Module:
    return Spectral("parametrization")


BUILD = {"hook": build_hook, "parametrization": build_parametrization}


@pytest.fixture(scope="module", params=list(NORMS))
def spectral_zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", 4, BUILD[request.param])
    for k, file in enumerate(sorted((folder / "zoo").glob("*.safetensors"))):  # one sign per ingredient: an equal model
        state = load_file(file)
        flipped = {n: t * (-1) ** k if n.endswith(("_u", "_v")) else t for n, t in state.items()}
        save_file(flipped, file)
    return request.param, folder


def nll_of(model: nn.Module, folder: Path) -> float:
    arrays = np.load(folder / "test.npz")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(arrays["images"]))
        return F.cross_entropy(logits, torch.from_numpy(arrays["labels"])).item()


@pytest.mark.parametrize("method", ["uniform", "mehl+", pytest.param("greedy", marks=pytest.mark.slow), "best_single"])
def test_every_soup_has_the_singular_vectors_of_its_own_weights(spectral_zoo: tuple[str, Path], method: str) -> None:
    kind, folder = spectral_zoo
    states = [load_file(file) for file in sorted((folder / "zoo").glob("*.safetensors"))]
    arrays = {name: np.load(folder / f"{name}.npz") for name in ("heldout", "test")}
    batches = {n: [(torch.from_numpy(a["images"]), torch.from_numpy(a["labels"]))] for n, a in arrays.items()}
    soup = ray_soup.mix_state_dicts(
        BUILD[kind](), states, batches["heldout"], method, test=batches["test"], learn={"epochs": 2, "batch_size": 100},
        precision="float32",
    )  # fmt: skip
    model = BUILD[kind]()
    model.load_state_dict(soup.state_dict())
    ours = nll_of(model, folder)
    assert abs(soup.figures["test_nll"] - ours) < 1e-5  # what is reported is what the user's model computes
    if len(soup.coefficients.used()) == 1:
        assert any(all(torch.equal(t, soup.state_dict()[n]) for n, t in state.items()) for state in states)
        return
    model.train()
    with torch.no_grad():
        for _ in range(500):  # torch's own power iterations at these weights
            model(batches["test"][0][0][:2])
    assert abs(nll_of(model, folder) - ours) < 1e-3 * ours
    if method == "mehl+":
        best = min(line["select_nll"] for line in soup.record["curve"])
        assert abs(best - soup.figures["select_nll"]) < 1e-3  # the vectors were right while learning, too


def test_the_vectors_go_with_the_coefficients_so_that_a_copy_is_baked_without_the_model(
    spectral_zoo: tuple[str, Path], tmp_path: Path
) -> None:
    from ray_soup.soups.finished import bake_copy, verify

    kind, folder = spectral_zoo
    recipe = {**values(folder, model=f"{__name__}:build_{kind}"), "method": "uniform", "data": {}}
    soup = ray_soup.uniform(recipe, tmp_path / "out")
    assert len(verify(tmp_path / "out")) >= 4
    bake_copy(tmp_path / "out", tmp_path / "copy")
    made, copy = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "copy"))
    assert all(torch.equal(tensor, copy[name]) for name, tensor in made.items())
    assert soup.record["method"] == "uniform"
