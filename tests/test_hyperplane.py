from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ray_soup.blocks import layout_of, partition
from ray_soup.coefficients import to_coefficients, to_x
from ray_soup.directions import DTYPES
from ray_soup.hyperplane import Hyperplane, combine_wide, made_up_plane, project_wide
from ray_soup.hyperplane import widened as read
from tests.test_directions import dense, make_store, widened
from tests.tiny import Tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model", 900])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 6], [3]])
def test_combine_and_project_are_the_formulas(zoo: Path, dtype: str, blocks: str | int, chosen: list[int]) -> None:
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, dtype)
    parts, _ = store.blocks(partition(layout, blocks))
    rows = widened(store)[chosen]
    random = np.random.default_rng(0)
    x = random.standard_normal((len(chosen), parts.count)).astype(np.float32)
    base = random.standard_normal(layout.numel).astype(np.float32)
    gradient = random.standard_normal(layout.numel).astype(np.float32)
    column = np.repeat(parts.block, layout.sizes)
    combined = base + (np.where(column >= 0, x[:, column], 0) * rows).sum(axis=0)
    projected = np.stack([(rows * gradient)[:, column == b].sum(axis=1) for b in range(parts.count)], axis=1)
    for low, high, threads in [(0, layout.numel, 1), (0, 1001, 2), (1001, layout.numel, 3)]:
        plane = Hyperplane(store, parts, low, high, CPU, threads)
        plane.choose(np.array(chosen))
        out, wide = torch.zeros(high - low), torch.zeros(high - low)
        base_slice, gradient_slice = torch.from_numpy(base[low:high]), torch.from_numpy(gradient[low:high])
        combine_wide(plane, plane.rows(), wide, base_slice, x)
        plane.combine(out[:], base_slice, x)
        np.testing.assert_allclose(out.numpy(), combined[low:high], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(wide.numpy(), combined[low:high], atol=1e-5, rtol=1e-5)
        inside = np.stack(
            [(rows * gradient)[:, low:high][:, column[low:high] == b].sum(axis=1) for b in range(parts.count)], axis=1
        )
        for found in (plane.project(gradient_slice), project_wide(plane, plane.rows(), gradient_slice)):
            np.testing.assert_allclose(found, inside, atol=1e-5 * np.abs(projected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_kernels_for_gpus_are_the_formulas(zoo: Path, dtype: str) -> None:
    """Run by Triton's interpreter, on the CPU."""
    cuda = pytest.importorskip("ray_soup.kernels_cuda")
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, dtype)
    random = np.random.default_rng(0)
    base, gradient = (torch.from_numpy(random.standard_normal(layout.numel).astype(np.float32)) for _ in range(2))
    for blocks, chosen, low, high in (("tensor", [5, 2, 6], 0, layout.numel), ("layer", [3], 1001, 4001)):
        parts, _ = store.blocks(partition(layout, blocks))
        x = random.standard_normal((len(chosen), parts.count)).astype(np.float32)
        plane = Hyperplane(store, parts, low, high, CPU)
        plane.choose(np.array(chosen))
        rows, tiles = plane.rows(), cuda.cut(plane.pieces, low, parts.count, CPU)
        scales = torch.from_numpy(store.scales[chosen])
        out = base[low:high].clone()
        expected = torch.zeros(high - low)
        cuda.combine(out, base[low:high], rows, scales, tiles, torch.from_numpy(x))
        combine_wide(plane, rows, expected, base[low:high], x)
        np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=1e-5, rtol=1e-5)
        found, wide = cuda.project(gradient[low:high], rows, scales, tiles), project_wide(plane, rows, gradient[low:high])
        np.testing.assert_allclose(found.numpy(), wide, atol=1e-5 * np.abs(wide).max())


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_projected_gradient_is_autograd_of_the_coefficients(zoo: Path, blocks: str) -> None:
    """Through a graph of all ingredients, in float64: dL/dy of theta[b] = sum_k c[k, b] theta_k[b]."""
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, "float32")
    parts, norms = store.blocks(partition(layout, blocks))
    vectors = torch.from_numpy(dense(zoo / "zoo", layout))
    random = np.random.default_rng(1)
    y = torch.from_numpy(0.1 * random.standard_normal(norms.shape)).requires_grad_()
    held_out = np.load(zoo / "heldout.npz")
    images, labels = torch.from_numpy(held_out["images"][:64]), torch.from_numpy(held_out["labels"][:64])

    x = y / torch.from_numpy(norms)
    c = x + (1 - x.sum(dim=0)) / len(x)
    theta, position = {}, 0
    for name, shape, size, block in zip(layout.names, layout.shapes, layout.sizes, parts.block, strict=True):
        weights = c[:, block] if block >= 0 else torch.full((len(c),), 1 / len(c), dtype=torch.float64)
        theta[name] = (weights @ vectors[:, position : position + size]).view(shape)
        position += size
    model = Tiny().double()
    model.float = lambda: model
    logits = torch.func.functional_call(model, theta, (DoubleImages(images),))
    F.cross_entropy(logits, labels, reduction="sum").backward()

    plane = Hyperplane(store, parts, 0, layout.numel, CPU)
    plane.choose(np.arange(len(norms)))
    ours = Tiny()
    vector, gradient = torch.zeros(layout.numel), torch.zeros(layout.numel)
    from ray_soup.blocks import flatten

    flatten(ours, vector, gradient, layout)
    vector.copy_(torch.from_numpy(np.array(store.center)))
    x_sent = to_x(y.detach().numpy(), norms)
    plane.combine(vector, torch.from_numpy(np.array(store.center)), x_sent.astype(np.float32))
    F.cross_entropy(ours(images), labels, reduction="sum").backward()
    found = to_x(plane.project(gradient), norms)
    expected = y.grad.numpy()
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(to_coefficients(x_sent).sum(axis=0), 1, atol=1e-12)


class DoubleImages:
    """Images that the model casts to float64 where it says float()."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def float(self) -> torch.Tensor:
        return self.images.double()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_made_up_directions_are_the_same_numbers_in_every_dtype(dtype: str) -> None:
    """Not bits that stand for others: with denormal numbers a processor is slower than with real directions."""
    there, here = (made_up_plane(d, 3, 1000, torch.device("cpu"), 1).store for d in ("float32", dtype))
    torch.testing.assert_close(read(here, 0, 1000, 0), read(there, 0, 1000, 0), rtol=0, atol=0)
    assert here.rows.dtype == DTYPES[dtype]
