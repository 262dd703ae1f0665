"""The file of differences: what is applied is what the formula says, in any dtype and number of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import RecipeError
from ray_soup.mixing import difference
from ray_soup.mixing.difference import apply_difference, open_difference, trained, write_difference

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (), "c": (0, 2), "d": (40,)}


def changes(scale: float = 1e-3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: scale * torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_the_written_soup_plus_the_difference_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(difference, "RANGE", 7)
    change, soup = changes(), {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    save_file({**soup, "buffer": torch.arange(4)}, tmp_path / "model.safetensors")
    write_difference(tmp_path / "difference.safetensors", SHAPES, lambda name: change[name].reshape(-1))
    saved = load_file(tmp_path / "difference.safetensors")
    assert saved.keys() == SHAPES.keys()
    assert all(torch.equal(saved[name], change[name]) for name in SHAPES)
    opened = open_difference(str(tmp_path / "difference.safetensors"), SHAPES)
    norm = apply_difference(opened, tmp_path / "model.safetensors")
    model = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model["buffer"], torch.arange(4))
    for name, values in soup.items():
        assert model[name].dtype == dtype
        assert torch.equal(model[name], (values.to(torch.float32) + change[name]).to(dtype))
        assert torch.equal(model[name], trained(values, change[name], dtype))
    squares = [sum(float(t.double().square().sum()) for t in tensors.values()) for tensors in (change, soup)]
    assert norm == pytest.approx((squares[0] / squares[1]) ** 0.5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["difference.safetensors", "model.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": torch.zeros(5, 3)}, r"its tensor a is float32 \[5, 3\]; expected: float32 \[3, 5\]"),
        ({"d": torch.zeros(40, dtype=torch.float16)}, r"its tensor d is float16 \[40\]; expected: float32 \[40\]"),
        ({"e": torch.zeros(2)}, r"its tensor e is float32 \[2\]; expected: missing"),
    ],
)
def test_a_difference_of_another_model_is_refused(tmp_path: Path, wrong: dict[str, torch.Tensor], message: str) -> None:
    save_file({**changes(), **wrong}, tmp_path / "d.safetensors")
    with pytest.raises(RecipeError, match=message):
        open_difference(str(tmp_path / "d.safetensors"), SHAPES)
