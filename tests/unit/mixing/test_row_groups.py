"""Blocks that are groups of rows: where they are cut, and that nothing else depends on it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.mixing.bake import as_tensor, bake, soup_range
from ray_soup.mixing.blocks import Layout, Partition, flatten, layout_of, partition
from ray_soup.mixing.coefficients import (
    FORMAT,
    MEAN,
    ROWS_FORMAT,
    Coefficients,
    check_covers,
    load_coefficients,
    save_coefficients,
    save_table,
    to_coefficients,
    to_x,
)
from ray_soup.mixing.distributed_bake import bake_distributed
from ray_soup.mixing.hyperplane import Hyperplane, combine_in_torch, project_in_torch
from ray_soup.mixing.row_groups import row_cuts
from ray_soup.mixing.stores import gram
from ray_soup.soups.proof import compare_sample
from ray_soup.soups.report.trajectories import by_layer
from tests.unit.mixing.stores import bound, dense, make_store, stored_directions

CPU = torch.device("cpu")
COUNT = 5


class Rows(nn.Module):
    """Layers of all kinds. A chunk of a store has less than `wide`, and `frozen` has rows that no ingredient moves."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(130, 150)
        self.norm = nn.LayerNorm(150)
        self.attention = nn.MultiheadAttention(150, 6, batch_first=True)
        self.up = nn.ConvTranspose1d(3, 8, 1)
        self.conv = nn.Conv2d(1, 10, 3)
        self.frozen = nn.Embedding(9, 4)
        self.same = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(150, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.wide(x))[:, None]
        y = y + self.attention(y, y, y)[0]
        z = (
            self.up(x[:, :3, None])[:, :, 0].mean(dim=1, keepdim=True)
            + self.conv(x[:, None, :12].reshape(-1, 1, 3, 4)).mean()
        )
        e = self.frozen(torch.arange(9)).sum(dim=1) @ torch.arange(9.0).to(x.dtype)
        return self.head(y[:, 0]) * self.scale + z + e + self.same(x[:, :6]).mean()


def recut(layout: Layout, random: np.random.Generator) -> Partition:
    """Groups of rows of random sizes."""
    names, first, cuts = [], [], {}
    for t, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
        first.append(len(names))
        rows = sorted(random.choice(shape[0] - 1, min(3, shape[0] - 1), replace=False) + 1) if shape and shape[0] > 1 else []
        if rows:
            cuts[t] = tuple(int(row) * int(layout.sizes[t]) // shape[0] for row in rows)
        names += [f"{name}.{n}" for n in range(len(rows) + 1)]
    return Partition(tuple(names), np.array(first, dtype=np.int64), cuts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five random ingredients near each other."""
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(0)
    start = Rows().state_dict()
    for k in range(COUNT):
        torch.manual_seed(k + 1)
        state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in start.items()}
        state["frozen.weight"][3:6] = start["frozen.weight"][3:6]
        state |= {name: start[name] for name in ("same.weight", "same.bias")}
        save_file(state, folder / f"{k}.safetensors")
    return folder


@pytest.fixture(scope="module")
def layout() -> Layout:
    return layout_of(Rows())


def column_of(parts: Partition, layout: Layout) -> np.ndarray:
    """Return the block of every parameter, int64 [N], by the names of the blocks alone."""
    column, rows = [], {name: b for b, name in enumerate(parts.names)}
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
        found = [n for n in parts.names if n == name or n.startswith(f"{name}[")]
        for one in found:
            low, high = map(int, one[len(name) + 1 : -1].split(":")) if one != name else (0, shape[0] if shape else 1)
            column += [rows[one]] * ((high - low) * int(size) // (shape[0] if shape else 1))
        column += [-1] * int(size) if not found else []
    return np.array(column)


# Where tensors are cut


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 1000])
def test_groups_cover_the_rows_of_each_tensor_evenly_and_in_order(layout: Layout, groups: int) -> None:
    parts = partition(layout, {"tensor": groups})
    assert len(set(parts.names)) == parts.count
    assert np.array_equal(np.unique(column_of(parts, layout)), np.arange(parts.count))
    position = 0
    for t, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
        size = int(layout.sizes[t])
        found = list(parts.groups(t, size))
        assert [block for *_, block in found] == list(range(position, position + len(found)))
        assert [start for start, *_ in found] + [size] == [0] + [stop for _, stop, _ in found]
        position += len(found)
        unit = layout.together.get(name, 1)
        if len(shape) > 1:
            assert len(found) == min(groups, max(1, shape[0] // unit))
            heights = [(stop - start) * shape[0] // size // unit for start, stop, _ in found]
            assert max(heights) - min(heights) <= 1
    assert position == parts.count
    if groups == 1:
        whole = partition(layout, "tensor")
        assert (parts.names, parts.cuts) == (whole.names, whole.cuts)
        assert np.array_equal(parts.block, whole.block)


def test_vectors_follow_the_matrix_of_their_module_and_heads_stay_whole(layout: Layout) -> None:
    parts = partition(layout, {"tensor": 4})
    cuts = {}
    for t, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
        cuts[name] = [element * shape[0] // int(layout.sizes[t]) for element in parts.cuts.get(t, ())]
    assert cuts["wide.weight"] == cuts["wide.bias"] == [37, 75, 112]
    assert cuts["attention.in_proj_weight"] == cuts["attention.in_proj_bias"] == [4 * 25, 9 * 25, 13 * 25]
    assert cuts["conv.weight"] == cuts["conv.bias"] == [2, 5, 7]
    assert cuts["norm.weight"] == cuts["norm.bias"] == []
    assert cuts["up.weight"] == cuts["up.bias"] == []
    assert parts.names[0] == "scale"
    assert parts.names[1:5] == ("wide.weight[0:37]", "wide.weight[37:75]", "wide.weight[75:112]", "wide.weight[112:150]")


class Heads(nn.Module):
    """Projections of a model that tells about its heads in `told`."""

    def __init__(self, names: dict[str, tuple[int, int]], **told: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        for name, shape in names.items():
            setattr(self.attn, name, nn.Linear(shape[1], shape[0]))
        for name, value in told.items():
            setattr(self.attn, name, value)


@pytest.mark.parametrize(
    ("name", "shape", "told", "unit"),
    [
        ("qkv", (72, 24), {"num_heads": 6, "head_dim": 4}, 4),
        ("qkv", (72, 24), {"num_heads": 6}, 4),
        ("qkv", (72, 24), {}, 24),
        ("qkv", (70, 24), {}, 70),
        ("qkv_proj", (40, 24), {"num_attention_heads": 6, "head_dim": 4}, 4),
        ("query_key_value", (72, 24), {"num_attention_heads": 6, "hidden_size": 24}, 12),
        ("c_attn", (72, 24), {"n_head": 3, "n_embd": 24}, 8),
        ("q_proj", (24, 24), {"num_heads": 6, "embed_dim": 24}, 4),
        ("k_proj", (8, 24), {"num_heads": 6, "head_dim": 4}, 4),
        ("query", (24, 24), {"num_attention_heads": 2}, 12),
        ("query", (24, 24), {}, 24),
        ("out_proj", (24, 24), {"num_heads": 6, "head_dim": 4}, 1),
        ("Wqkv", (72, 24), {"num_heads": True}, 24),
        ("Wqkv", (72, 24), {"num_heads": 7, "head_dim": 5}, 24),
    ],
)
def test_rows_of_a_head_stay_together(name: str, shape: tuple[int, int], told: dict[str, int], unit: int) -> None:
    layout = layout_of(Heads({name: shape}, **told))
    assert layout.together.get(f"attn.{name}.weight", 1) == unit
    cuts = next(row_cuts(layout.names, layout.shapes, layout.together, 1000))
    assert cuts == tuple(range(unit, shape[0], unit))


def test_a_model_whose_attributes_raise_has_a_layout() -> None:
    class Odd(nn.Linear):
        @property
        def num_heads(self) -> int:
            raise RuntimeError("not built yet")

        config = num_heads

    assert layout_of(nn.ModuleDict({"query": Odd(4, 6)})).together == {"query.weight": 6}


@pytest.mark.slow
def test_libraries_tell_their_heads() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    vit = layout_of(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32))
    assert vit.together == {"blocks.0.attn.qkv.weight": 64}
    shared = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = layout_of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, num_key_value_heads=2)))
    projections = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    assert llama.together == dict.fromkeys(projections, 8)
    bert = layout_of(transformers.BertForMaskedLM(transformers.BertConfig(**shared)))
    within = "bert.encoder.layer.0.attention.self"
    assert bert.together == {f"{within}.{x}.weight": 8 for x in ("query", "key", "value")}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=32, n_head=4, n_layer=1, n_positions=8))
    found = layout_of(gpt)
    inside = [n for n in found.names if ".attn.c_" in n or ".mlp.c_" in n]
    cut = partition(found, {"tensor": 4})
    assert [n for n in inside if found.names.index(n) in cut.cuts] == []
    assert found.names.index("transformer.wte.weight") in cut.cuts


@pytest.mark.parametrize("wrong", [{"tensor": 0}, {"layer": 2}, {"tensor": 2, "layer": 2}, {}])
def test_other_mappings_are_no_blocks(layout: Layout, wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"\{tensor: R\} for R groups of rows"):
        partition(layout, wrong)


# The formulas


def test_one_group_has_the_bits_of_whole_tensors(folder: Path, layout: Layout) -> None:
    store = make_store(str(folder), layout, "int8")
    (one, norms_of_one), (whole, norms) = (store.blocks(partition(layout, b)) for b in ({"tensor": 1}, "tensor"))
    assert one.names == whole.names
    assert norms_of_one.tobytes() == norms.tobytes()
    assert np.array_equal(store.pieces(one, 0, layout.numel), store.pieces(whole, 0, layout.numel))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_norms_are_those_of_the_directions_and_zero_for_rows_that_are_equal(
    folder: Path, layout: Layout, dtype: str
) -> None:
    store = make_store(str(folder), layout, dtype)
    parts, norms = store.blocks(partition(layout, {"tensor": 3}))
    assert not any(name.startswith("same.") for name in parts.names)
    vectors = dense(folder, layout)
    exact, column = vectors - vectors.mean(axis=0), column_of(parts, layout)
    expected = np.stack([np.linalg.norm(exact[:, column == b], axis=1) for b in range(parts.count)], axis=1)
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 2e-2, "int4": 0.2}[dtype]
    np.testing.assert_allclose(norms, expected, rtol=tolerance, atol=1e-12)
    frozen = parts.names.index("frozen.weight[3:6]")
    assert not norms[:, frozen].any()
    assert np.count_nonzero(~norms.any(axis=0)) == 1
    assert np.isfinite(to_x(np.ones_like(norms), norms)).all()
    whole, of_tensors = store.blocks(partition(layout, "tensor"))
    for name in whole.names:
        some = [b for b, n in enumerate(parts.names) if n == name or n.startswith(f"{name}[")]
        np.testing.assert_allclose(np.linalg.norm(norms[:, some], axis=1), of_tensors[:, whole.names.index(name)], rtol=5e-2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_combine_and_project_of_any_slice_are_the_formulas(folder: Path, layout: Layout, dtype: str, seed: int) -> None:
    """For random groups, on random shards, in the compiled loops and in torch."""
    random = np.random.default_rng(seed)
    store = make_store(str(folder), layout, dtype)
    parts, _ = store.blocks(recut(layout, random))
    column = np.full(layout.numel, -1)
    for t, offset in enumerate(layout.offsets[:-1]):
        for start, stop, block in parts.groups(t, int(layout.sizes[t])) if parts.block[t] >= 0 else ():
            column[offset + start : offset + stop] = block
    wide = stored_directions(store)
    chosen = random.permutation(COUNT)[: random.integers(1, COUNT + 1)]
    x = random.standard_normal((len(chosen), parts.count)).astype(np.float32)
    base, gradient = (random.standard_normal(layout.numel).astype(np.float32) for _ in range(2))
    combined = base + (np.where(column >= 0, x[:, column], 0) * wide[chosen]).sum(axis=0)
    products = wide[chosen] * gradient
    cut = int(random.integers(1, layout.numel))
    sums, inner, slices = [], np.zeros((COUNT, COUNT)), []
    for low, high in ((0, cut), (cut, layout.numel), (0, layout.numel)):
        plane = Hyperplane(store, parts, low, high, CPU, threads=2)
        plane.choose(chosen)
        part, out = torch.from_numpy(base[low:high]), torch.zeros(2, high - low)
        plane.combine(out[0], part, x)
        combine_in_torch(plane, plane.rows(), out[1], part, x)
        slices.append(out[0])
        for found in out:
            np.testing.assert_allclose(found.numpy(), combined[low:high], atol=1e-5, rtol=1e-5)
        g = torch.from_numpy(gradient[low:high])
        sums.append(plane.project(g))
        np.testing.assert_allclose(project_in_torch(plane, plane.rows(), g), sums[-1], atol=1e-4)
        if (low, high) != (0, layout.numel):
            inner += sum(gram(plane, (n, 2)) for n in range(2))
    assert torch.equal(torch.cat(slices[:2]), slices[2])
    expected = np.stack([products[:, column == b].sum(axis=1) for b in range(parts.count)], axis=1)
    np.testing.assert_allclose(sums[0] + sums[1], expected, atol=1e-5 * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(inner, wide @ wide.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [2, 4, 50])
def test_the_gradient_is_that_of_autograd(folder: Path, layout: Layout, groups: int) -> None:
    """Compared with a graph of all ingredients in float64, in which each row has the coefficients of its group."""
    store = make_store(str(folder), layout)
    parts, norms = store.blocks(partition(layout, {"tensor": groups}))
    vectors, column = torch.from_numpy(dense(folder, layout)), column_of(parts, layout)
    random = np.random.default_rng(1)
    y = torch.from_numpy(0.1 * random.standard_normal(norms.shape)).requires_grad_()
    inputs, labels = torch.from_numpy(random.standard_normal((40, 130))), torch.from_numpy(random.integers(0, 10, 40))

    known = torch.from_numpy(norms)
    x = torch.where(known > 0, y / torch.where(known > 0, known, 1), 0)
    c = x + (1 - x.sum(dim=0)) / COUNT
    of_elements = torch.where(torch.from_numpy(column) >= 0, c[:, column], 1 / COUNT)
    theta = (of_elements * vectors).sum(dim=0)
    pieces = {n: theta[a:b].view(s) for (n, a, b), s in zip(layout.spans(), layout.shapes, strict=True)}
    F.cross_entropy(torch.func.functional_call(Rows().double(), pieces, (inputs,)), labels, reduction="sum").backward()

    plane = Hyperplane(store, parts, 0, layout.numel, CPU)
    plane.choose(np.arange(COUNT))
    ours, center = Rows(), torch.from_numpy(np.array(store.center))
    vector, gradient = center.clone(), torch.zeros(layout.numel)
    flatten(ours, vector, gradient, layout)
    plane.combine(vector, center, to_x(y.detach().numpy(), norms).astype(np.float32))
    F.cross_entropy(ours(inputs.float()), labels, reduction="sum").backward()
    found, expected = to_x(plane.project(gradient), norms), y.grad.numpy()
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    moved = np.linalg.norm(expected, axis=0) > 1e-9  # queries and keys of a single token have no gradient but rounding
    assert np.count_nonzero(moved) > 0.6 * parts.count


# Coefficients and models


def coefficients_for(layout: Layout, parts: Partition, **changes: object) -> Coefficients:
    values = to_coefficients(np.random.default_rng(2).standard_normal((COUNT, parts.count)))
    block_of = dict(zip(layout.names, parts.block.tolist(), strict=True))
    cuts = {layout.names[t]: found for t, found in parts.cuts.items()}
    return Coefficients(values, tuple(map(str, range(COUNT))), parts.names, block_of, cuts=cuts, **changes)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("groups", [3, 1000])
def test_the_model_is_the_mix_of_each_row_by_the_coefficients_of_its_group(
    folder: Path, layout: Layout, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file is written range by range, and in a distributed checkpoint; another reader proves it."""
    parts, _ = make_store(str(folder), layout).blocks(partition(layout, {"tensor": groups}))
    coefficients = coefficients_for(layout, parts, factor=1.5, factored=("head.weight", "head.bias"))
    ingredients = bound(str(folder), layout)
    for module in ("bake", "distributed_bake"):
        monkeypatch.setattr(f"ray_soup.mixing.{module}.RANGE", 1001)  # no multiple of a row
    model = bake(coefficients, ingredients, tmp_path / "soup.safetensors")
    (tmp_path / "dcp").mkdir()
    bake_distributed(coefficients, ingredients, tmp_path / "dcp")
    soup, states = load_file(model), [load_file(folder / f"{k}.safetensors") for k in range(COUNT)]
    loaded = {name: torch.zeros_like(tensor) for name, tensor in soup.items()}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    column = column_of(parts, layout)
    for t, (name, start, stop) in enumerate(layout.spans()):
        c = np.where(column[start:stop] >= 0, coefficients.values[:, column[start:stop]], 1 / COUNT)
        exact = sum(c[k] * states[k][name].double().numpy().ravel() for k in range(COUNT)) * (1.5 if "head" in name else 1)
        np.testing.assert_allclose(soup[name].numpy().ravel(), exact, rtol=2**-23, atol=1e-7)
        assert torch.equal(soup[name], loaded[name])
        of_elements = coefficients.at(name, np.arange(stop - start))
        np.testing.assert_array_equal(np.broadcast_to(of_elements, c.shape), c * (1.5 if "head" in name else 1))
        if t in parts.cuts:
            with pytest.raises(ValueError, match="groups of rows"):
                coefficients.of(name)
    written = open_ingredient(str(model))
    assert compare_sample(coefficients, ingredients, written)
    tensor = bytearray(model.read_bytes())
    tensor[-3] ^= 64
    model.write_bytes(tensor)
    with pytest.raises(Exception, match=r"has .* where the ingredients"):
        compare_sample(coefficients, ingredients, written)


def test_saving_and_loading_is_the_identity_and_older_versions_refuse_the_file(layout: Layout, tmp_path: Path) -> None:
    made = coefficients_for(layout, partition(layout, {"tensor": 3}))
    save_coefficients(made, tmp_path / "c.safetensors")
    found = load_coefficients(tmp_path / "c.safetensors")
    assert found.values.tobytes() == made.values.tobytes()
    assert (found.blocks, found.block_of, found.cuts) == (made.blocks, made.block_of, made.cuts)
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata()["format"] == ROWS_FORMAT != FORMAT
    check_covers(found, layout.state_shapes, tmp_path)
    save_table(found, tmp_path / "c.parquet")
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "c.parquet").to_pydict()
    assert table["block"][: len(made.blocks)] == list(made.blocks)
    assert np.array(table["coefficient"]).tobytes() == made.values.tobytes()
    layers = by_layer(found)
    assert layers.shape[1] == len({name.rpartition(".")[0] for name in layout.names})
    wide = [b for b, name in enumerate(found.blocks) if name.startswith("wide.")]
    np.testing.assert_allclose(layers[:, 1], found.values[:, wide].mean(axis=1))
    save_coefficients(coefficients_for(layout, partition(layout, "tensor")), tmp_path / "whole.safetensors")
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        assert file.metadata()["format"] == FORMAT
        assert "cuts" not in file.metadata()


@pytest.mark.parametrize(
    ("cuts", "format", "message"),
    [
        ({"wide.weight": [4940, 9880]}, FORMAT, "groups of rows belong to the format"),
        ({}, ROWS_FORMAT, "groups of rows belong to the format"),
        ({"wide.weight": []}, ROWS_FORMAT, "cuts.wide.weight"),
        ({"wide.weight": [9880, 4940]}, ROWS_FORMAT, "begin at the elements"),
        ({"wide.weight": [0, 4940]}, ROWS_FORMAT, "begin at the elements"),
        ({"head.bias": list(range(1, 10))}, ROWS_FORMAT, "which are no blocks"),
        ({"other": [5]}, ROWS_FORMAT, "which are no blocks"),
        ({"same.bias": [3]}, ROWS_FORMAT, "which are no blocks"),
    ],
)
def test_groups_that_cannot_be_are_refused(
    layout: Layout, tmp_path: Path, cuts: dict[str, list[int]], format: str, message: str
) -> None:
    from safetensors.torch import save

    made = coefficients_for(layout, partition(layout, {"tensor": 3}))
    made.block_of["same.bias"] = MEAN
    save_coefficients(made, tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        metadata, values = file.metadata(), file.get_tensor("coefficients")
    metadata |= {"format": format, "cuts": json.dumps(cuts)}
    (tmp_path / "c.safetensors").write_bytes(save({"coefficients": values}, metadata))
    with pytest.raises(RecipeError, match=message):
        load_coefficients(tmp_path / "c.safetensors")


@pytest.mark.parametrize("cuts", [(1,), (150 * 130,), (130 * 75, 130 * 151), (131,)])
def test_groups_that_are_no_rows_of_the_model_are_refused(layout: Layout, cuts: tuple[int, ...]) -> None:
    made = coefficients_for(layout, partition(layout, {"tensor": 3}))
    made.cuts["wide.weight"] = cuts
    with pytest.raises(RecipeError, match=r"groups of rows of wide\.weight .* not within \[150, 130\]"):
        check_covers(made, layout.state_shapes, Path("c.safetensors"))


def test_any_shapes_and_any_cuts_are_mixed_row_by_row(tmp_path: Path) -> None:
    """Shapes of 0 to 3 dimensions, some of them empty, compared with a loop over rows."""
    random = np.random.default_rng(3)
    shapes = {f"t{n}.{n}": tuple(int(d) for d in random.integers(0, 7, n % 4)) for n in range(40)}
    for k in range(2):
        state = {n: torch.from_numpy(random.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}
        save_file(state, tmp_path / f"{k}.safetensors")
    states = [load_file(tmp_path / f"{k}.safetensors") for k in range(2)]
    layout = Layout(tuple(shapes), tuple(shapes.values()))
    ingredients = bound(str(tmp_path / "*.safetensors"), layout)
    for groups in (1, 2, 3, 100):
        parts = partition(layout, {"tensor": groups})
        values = to_coefficients(random.standard_normal((2, parts.count)))
        cuts = {layout.names[t]: found for t, found in parts.cuts.items()}
        made = Coefficients(
            values, ("0", "1"), parts.names, dict(zip(layout.names, parts.block.tolist(), strict=True)), cuts=cuts
        )
        check_covers(made, shapes, tmp_path)
        for t, (name, shape) in enumerate(shapes.items()):
            size = int(layout.sizes[t])
            found = as_tensor(soup_range(made, ingredients, name, 0, size, "float64"))
            bounds = [0, *parts.cuts.get(t, ()), size]
            for block, (low, high) in enumerate(itertools.pairwise(bounds), start=int(parts.block[t])):
                exact = sum(values[k, block] * states[k][name].double().ravel()[low:high] for k in range(2))
                torch.testing.assert_close(found[low:high], exact)
            assert len(bounds) - 1 == (min(groups, shape[0]) if len(shape) > 1 and size else 1)
