from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ray_soup.mixing.blocks import flatten, layout_of, partition
from ray_soup.mixing.coefficients import to_coefficients, to_x
from ray_soup.mixing.directions import DTYPES
from ray_soup.mixing.hyperplane import (
    Hyperplane,
    combine_in_torch,
    decompressed,
    project_in_torch,
    synthetic_plane,
)
from ray_soup.mixing.store_format import GROUP, ITEMSIZE
from tests.tiny import Tiny
from tests.unit.mixing.stores import dense, make_store, stored_directions

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model", 900])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 6], [3]])
def test_combine_and_project_are_the_formulas(zoo: Path, dtype: str, blocks: str | int, chosen: list[int]) -> None:
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, dtype)
    parts, _ = store.blocks(partition(layout, blocks))
    rows = stored_directions(store)[chosen]
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
        out, in_torch = torch.zeros(high - low), torch.zeros(high - low)
        base_slice, gradient_slice = torch.from_numpy(base[low:high]), torch.from_numpy(gradient[low:high])
        combine_in_torch(plane, plane.rows(), in_torch, base_slice, x)
        plane.combine(out[:], base_slice, x)
        np.testing.assert_allclose(out.numpy(), combined[low:high], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(in_torch.numpy(), combined[low:high], atol=1e-5, rtol=1e-5)
        inside = np.stack(
            [(rows * gradient)[:, low:high][:, column[low:high] == b].sum(axis=1) for b in range(parts.count)], axis=1
        )
        for found in (plane.project(gradient_slice), project_in_torch(plane, plane.rows(), gradient_slice)):
            np.testing.assert_allclose(found, inside, atol=1e-5 * np.abs(projected).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_kernels_are_the_formulas(zoo: Path, dtype: str) -> None:
    """Triton's interpreter runs them on the CPU."""
    cuda = pytest.importorskip("ray_soup.mixing.kernels_cuda")
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, dtype)
    random = np.random.default_rng(0)
    base, gradient = (torch.from_numpy(random.standard_normal(layout.numel).astype(np.float32)) for _ in range(2))
    for blocks, chosen, low, high in (
        ("tensor", [5, 2, 6], 0, layout.numel),
        ("layer", [3], 1001, 4001),
        ({"tensor": 3}, [4, 1], 5, 3001),
    ):
        parts, _ = store.blocks(partition(layout, blocks))
        x = random.standard_normal((len(chosen), parts.count)).astype(np.float32)
        plane = Hyperplane(store, parts, low, high, CPU)
        plane.choose(np.array(chosen))
        group = GROUP if dtype == "int4" else 1
        rows, tiles = plane.rows(), cuda.cut(plane.pieces, low, plane.places[0], parts.count, CPU, group)
        scales = torch.from_numpy(store.scales[chosen])
        out = base[low:high].clone()
        expected = torch.zeros(high - low)
        cuda.combine(out, base[low:high], rows, scales, tiles, torch.from_numpy(x))
        combine_in_torch(plane, rows, expected, base[low:high], x)
        np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=1e-5, rtol=1e-5)
        found = cuda.project(gradient[low:high], rows, scales, tiles)
        in_torch = project_in_torch(plane, rows, gradient[low:high])
        np.testing.assert_allclose(found.numpy(), in_torch, atol=1e-5 * np.abs(in_torch).max())


@pytest.mark.parametrize(
    ("blocks", "dtype"),
    [("tensor", "float32"), ("layer", "float32"), ("model", "float32"), ("tensor", "int8"), ("tensor", "int4")],
)
def test_the_projected_gradient_is_that_of_autograd(zoo: Path, blocks: str, dtype: str) -> None:
    """Compared with a graph of all ingredients in float64: dL/dy of theta[b] = sum_k c[k, b] theta_k[b].

    Compressed directions stand for ingredients that differ from those in the files, and whose mean is not quite the center.
    """
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, dtype)
    parts, norms = store.blocks(partition(layout, blocks))
    center = torch.from_numpy(np.array(store.center)).double()
    vectors = torch.from_numpy(dense(zoo / "zoo", layout) if dtype == "float32" else stored_directions(store))
    random = np.random.default_rng(1)
    y = torch.from_numpy(0.1 * random.standard_normal(norms.shape)).requires_grad_()
    held_out = np.load(zoo / "heldout.npz")
    images, labels = torch.from_numpy(held_out["images"][:64]), torch.from_numpy(held_out["labels"][:64])

    x = y / torch.from_numpy(norms)
    c = x + (1 - x.sum(dim=0)) / len(x) if dtype == "float32" else x
    theta, position = {}, 0
    for name, shape, size, block in zip(layout.names, layout.shapes, layout.sizes, parts.block, strict=True):
        span = slice(position, position + size)
        mixed = c[:, block] @ vectors[:, span] if block >= 0 else 0
        theta[name] = (mixed + (0 if dtype == "float32" and block >= 0 else center[span])).view(shape)
        position += size
    model = Tiny().double()
    model.float = lambda: model
    logits = torch.func.functional_call(model, theta, (DoubleImages(images),))
    F.cross_entropy(logits, labels, reduction="sum").backward()

    plane = Hyperplane(store, parts, 0, layout.numel, CPU)
    plane.choose(np.arange(len(norms)))
    ours = Tiny()
    vector, gradient = torch.zeros(layout.numel), torch.zeros(layout.numel)
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
    """Images that become float64 when the model calls float()."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def float(self) -> torch.Tensor:
        return self.images.double()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_synthetic_directions_have_the_same_values_in_every_dtype(dtype: str) -> None:
    """Bits that stand for denormal values would slow a processor down, and the times would not be those of real ones."""
    reference, compressed = (synthetic_plane(d, 3, 1000, CPU, 1) for d in ("float32", dtype))
    found, expected = (decompressed(plane.store, plane.pieces[0]) for plane in (compressed, reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert compressed.store.rows.dtype == DTYPES[dtype]
    assert compressed.store.rows.itemsize == ITEMSIZE[dtype]


def test_synthetic_directions_in_int4_are_whole_numbers() -> None:
    plane = synthetic_plane("int4", 3, 1000, CPU, 1)
    found = decompressed(plane.store, plane.pieces[0])
    assert found.shape == (3, 1000)
    assert set(found.unique().tolist()) == set(range(-8, 8))
    assert plane.store.rows.nbytes == 3 * 1024 * ITEMSIZE["int4"]
