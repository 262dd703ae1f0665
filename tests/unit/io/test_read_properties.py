"""Whatever a checkpoint's layout, a soup of it is the mean of the values that torch itself loads."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError
from ray_soup.io.check import check_together
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.mixing.bake import bake
from ray_soup.mixing.coefficients import Coefficients

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where syncing takes no time
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unchanged": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "a column": lambda t: torch.stack([t, t + 3, t - 3], -1)[..., 0],
    "unbound": lambda t: torch.stack([t, t + 1], -1).unbind(-1)[1],
    "expanded": lambda t: t.reshape(-1)[:1].expand(4, min(1, t.numel())),
    "every second": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)])[::2],
    "with an offset": lambda t: torch.cat([t.reshape(-1), t.reshape(-1) - 1])[t.numel() // 2 :],
    "real": lambda t: torch.complex(t.float(), t.float() + 1).real,
    "imag": lambda t: torch.complex(t.float() + 1, t.float()).imag,
    "imag of a conjugate": lambda t: torch.complex(t.float() + 1, t.float()).conj().imag,  # a negative view
    "negative": lambda t: torch._neg_view(t),
    "rows of a negative": lambda t: torch._neg_view(torch.stack([t, t]))[1],
    "a parameter": lambda t: torch.nn.Parameter(t.clone()),
    "with attributes": lambda t: _tagged(t),
    "overlapping": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]).unfold(0, 2, 1) if t.numel() else t,
}


def _tagged(tensor: torch.Tensor) -> torch.Tensor:
    tagged = tensor.clone()
    tagged.note = "kept in the pickle"  # type: ignore[attr-defined]
    return tagged


@st.composite
def layouts(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The tensors of a model: for each its dtype, base shape, view, and whether it shares memory with the one before."""
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(DTYPES),
                    "shape": st.lists(st.integers(0, 5), max_size=3).map(tuple),
                    "view": st.sampled_from(sorted(VIEWS)),
                    "shares": st.booleans(),
                }
            ),
            min_size=1,
            max_size=4,
        )
    )


def state_of(layout: list[dict[str, Any]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    base = torch.zeros(0)
    for n, part in enumerate(layout):
        if not (part["shares"] and n):
            base = torch.randn(part["shape"], generator=generator, dtype=torch.float64).to(part["dtype"])
        with torch.no_grad():
            state[f"layer{n}.weight"] = VIEWS[part["view"]](base)
    return state


def save(state: dict[str, torch.Tensor], folder: Path, kind: str, container: str, prefix: str) -> tuple[Path, Any]:
    """Save a checkpoint; return its path and what torch or safetensors loads from it."""
    named = {prefix + name: tensor for name, tensor in state.items()}
    if kind == "safetensors":
        plain = {name: t.detach().resolve_neg().contiguous().clone() for name, t in named.items()}
        save_file(plain, folder / "m.safetensors", {"format": "pt"})
        return folder / "m.safetensors", load_file(folder / "m.safetensors")
    content = {container: named, "epoch": 3} if container else named
    if kind != "sharded":
        torch.save(content, folder / "m.pt")
        found = torch.load(folder / "m.pt", weights_only=True)
        return folder / "m.pt", found[container] if container else found
    files, loaded = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)], {}
    shard_of = {name: files[n % 2] for n, name in enumerate(named)}
    for file in set(shard_of.values()):
        part = {name: t if shard_of[name] == file else t.detach() + 9 for name, t in named.items()}  # others: decoys
        torch.save({container: part} if container else part, folder / file)
        again = torch.load(folder / file, weights_only=True)
        again = again[container] if container else again
        loaded |= {name: t for name, t in again.items() if shard_of[name] == file}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder, loaded


def numpy_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().resolve_neg().double().numpy()


def check_soup(layout: list[dict[str, Any]], count: int, kind: str, container: str, prefix: str) -> None:
    """The uniform soup is the float64 sum of the loaded values times 1/K, in order, rounded to the dtype of the output."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        loaded, ingredients = [], []
        for k in range(count):
            folder = Path(name) / str(k)
            folder.mkdir()
            path, found = save(state_of(layout, k), folder, kind, container, prefix)
            loaded.append(found)
            ingredients.append(open_ingredient(str(path)))
        bound: list[Ingredient] = check_together(ingredients)
        names = list(bound[0].tensors)
        share = 1 / count
        c = Coefficients(np.full((count, 1), share), tuple(map(str, range(count))), ("m",), dict.fromkeys(names, 0))
        soup = load_file(bake(c, bound, Path(name) / "soup.safetensors", threads=1))
        stored = {n.removeprefix(prefix): n for n in loaded[0]}
        for tensor_name in names:
            own = stored[tensor_name.removeprefix(prefix)]
            total, scale = np.zeros(tuple(loaded[0][own].shape)), 0.0
            for state in loaded:
                total += share * numpy_of(state[own])
                scale += float(np.abs(numpy_of(state[own])).max(initial=0.0))
            dtype = loaded[0][own].dtype
            wide = total if dtype == torch.float64 else total.astype(np.float32)
            expected = torch.from_numpy(wide).to(dtype)
            assert soup[tensor_name].dtype == dtype
            assert soup[tensor_name].shape == expected.shape
            rounding = scale * 1e-15  # of the float64 sum, whose terms may cancel
            assert torch.allclose(soup[tensor_name], expected, rtol=torch.finfo(dtype).eps, atol=rounding)
            for n, ingredient in enumerate(bound):  # every range, bit for bit
                flat = loaded[n][own].detach().resolve_neg().reshape(-1)
                size = len(flat)
                for start, stop in ((0, size), (size // 3, size), (1, size // 2), (size // 2, size // 2 + 1)):
                    if start <= stop <= size:
                        assert torch.equal(ingredient.read(tensor_name, start, stop), flat[start:stop])


PROPERTY = given(
    layout=layouts(),
    count=st.integers(2, 3),
    kind=st.sampled_from(["pt", "safetensors", "sharded"]),
    container=st.sampled_from(["", "state_dict", "model"]),
    prefix=st.sampled_from(["", "module.", "_orig_mod."]),
)
CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@PROPERTY
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=CHECKS)
def test_a_soup_is_the_mean_of_what_torch_loads(**drawn: Any) -> None:
    check_soup(**drawn)


@pytest.mark.slow
@PROPERTY
@settings(max_examples=1000, deadline=None, print_blob=True, suppress_health_check=CHECKS)
def test_a_soup_is_the_mean_of_what_torch_loads_in_many_more_cases(**drawn: Any) -> None:
    check_soup(**drawn)


def refused(kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "complex": lambda: torch.zeros(3, dtype=torch.complex64),
            "conjugate": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
            "sparse": lambda: torch.eye(3).to_sparse(),
            "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "meta": lambda: torch.zeros(3, device="meta"),
            "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            "float8": lambda: torch.zeros(3, dtype=torch.float8_e4m3fn),
            "uint16": lambda: torch.zeros(3, dtype=torch.uint16),
        }[kind]()


@pytest.mark.parametrize(
    "kind", ["complex", "conjugate", "sparse", "sparse rows", "quantized", "meta", "nested", "float8", "uint16"]
)
def test_a_tensor_that_cannot_be_mixed_is_named(tmp_path: Path, kind: str) -> None:
    torch.save({"fine": torch.ones(2), "odd.one": refused(kind)}, tmp_path / "a.pt")
    with pytest.raises(IngredientError, match=r"a\.pt: the tensor odd\.one is .*expected a dense tensor"):
        open_ingredient(str(tmp_path / "a.pt"))
