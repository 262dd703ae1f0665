from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.io.progress import drain
from ray_soup.recipe import Data
from ray_soup.task.data import load_named
from ray_soup.task.preprocess import NamedPreprocess, input_kind, preprocess_identity
from tests.unit.task.images import as_tensor, pairs, pictures, preprocessings, write_parquet


@pytest.mark.parametrize("name", ["open_clip", "timm", "weights", "v1", "v2", "gray", "erasing last", "unscaled"])
def test_images_cached_in_uint8_reach_the_model_bit_identical(tmp_path: Path, name: str) -> None:
    preprocess, dtype = preprocessings()[name]
    write_parquet(tmp_path / "a.parquet", pictures(), range(6))
    data = Data(test=str(tmp_path / "a.parquet"))
    examples = drain(load_named(data, "test", preprocess))
    assert examples.images.dtype == dtype
    assert (examples.tail is not None) == (dtype == np.uint8)
    expected = torch.stack([torch.as_tensor(preprocess(image)) for image in pictures()])
    found, labels = examples.batch(np.arange(6), torch.device("cpu"))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert labels.tolist() == list(range(6))
    again = drain(load_named(data, "test", preprocessings()[name][0]))
    assert again.hold.path == examples.hold.path  # an equal preprocessing finds the same cache entry


class Darker:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image) * self.by)


def test_a_preprocessing_is_identified_by_what_it_does() -> None:
    assert preprocess_identity(Darker(0.5)) == preprocess_identity(Darker(0.5)) != preprocess_identity(Darker(0.6))
    assert preprocess_identity(as_tensor) != preprocess_identity(pairs)
    assert " at 0x" not in str([preprocess_identity(p) for p, _ in preprocessings().values()])


def test_a_named_preprocessing_is_identified_by_its_text_alone() -> None:
    one, other = NamedPreprocess(Darker(0.5), "darker"), NamedPreprocess(Darker(0.6), "darker", takes="text")
    assert preprocess_identity(one) == preprocess_identity(other) == ["darker"]
    assert (input_kind(one), input_kind(other), input_kind(None)) == ("image", "text", "image")
