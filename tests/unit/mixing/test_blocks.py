from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ray_soup.errors import RecipeError
from ray_soup.mixing.blocks import Layout, flatten, layout_of, partition
from tests.tiny import Tiny


def test_the_model_computes_with_the_flat_vector() -> None:
    model = Tiny()
    layout = layout_of(model)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    vector, gradient = torch.zeros(layout.numel + 3), torch.zeros(layout.numel + 3)
    flatten(model, vector, gradient, layout)
    vector[: layout.numel] = before
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
    images = torch.randint(0, 17, (5, 8, 8))
    model(images).square().sum().backward()
    reference = Tiny()
    reference.load_state_dict(model.state_dict())
    reference(images).square().sum().backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in reference.parameters()]
    assert torch.equal(gradient[: layout.numel], torch.cat([g.flatten() for g in expected]))
    assert layout.buffers == {"mean": (), "seen": ()}


def test_tied_parameters_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    layout = layout_of(model)
    assert layout.names == ("embed.weight",)
    assert layout.tied == {"head.weight": "embed.weight"}
    assert layout.numel == 15


def test_a_parameter_that_is_not_a_float_is_refused_by_name() -> None:
    model = nn.Module()
    model.counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(RecipeError, match=r"parameter counts is torch\.int64; expected floats"):
        layout_of(model)


def test_every_partition_covers_every_tensor_once_in_order() -> None:
    layout = layout_of(Tiny())
    for blocks in ("tensor", "layer", "model", 1, 600, 10**9):
        parts = partition(layout, blocks)
        assert parts.block[0] == 0
        assert set(np.diff(parts.block)) <= {0, 1}
        assert parts.block[-1] == parts.count - 1
        assert len(set(parts.names)) == parts.count
        squares = np.random.default_rng(0).random((3, len(layout.names)))
        sums = parts.sum_tensors(squares)
        for b in range(parts.count):
            np.testing.assert_allclose(sums[:, b], squares[:, parts.block == b].sum(axis=1))


def test_a_layer_is_named_up_to_its_last_index() -> None:
    layout = layout_of(Tiny())
    parts = partition(layout, "layer")
    label = dict(zip(layout.names, (parts.names[b] for b in parts.block), strict=True))
    assert label["embed.weight"] == label["embed.bias"] == "embed"
    assert label["blocks.0.0.weight"] == label["blocks.0.0.bias"] == "blocks.0.0"
    assert label["head.weight"] == "head"


def test_tensors_of_a_layer_that_are_not_adjacent_make_blocks_with_distinct_names() -> None:
    layout = Layout(("a.weight", "b.weight", "a.bias"), ((2,), (2,), (2,)))
    parts = partition(layout, "layer")
    assert parts.block.tolist() == [0, 1, 2]
    assert parts.names == ("a@a.weight", "b@b.weight", "a@a.bias")


def test_blocks_have_the_minimum_size() -> None:
    layout = layout_of(Tiny())
    parts = partition(layout, 600)
    for b in range(parts.count):
        assert layout.sizes[parts.block == b].sum() >= 600
    assert partition(layout, 10**9).count == 1
    with pytest.raises(RecipeError, match="expected tensor, layer, model"):
        partition(layout, 0)
