"""Files mapped into memory by this package itself."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.mapped import mapped, regions


def is_mapped(path: Path) -> bool:
    return any(file == str(path) for _, _, file in regions())


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the system does not say what is mapped")
def test_a_map_ends_with_its_last_view_and_a_write_stays_in_this_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1000)
    with open(path, "rb") as file:
        whole = mapped(str(path), file.fileno(), 256_000)
    assert whole.tobytes() == path.read_bytes()
    part = whole[1000:1010]
    del whole
    gc.collect()
    assert is_mapped(path)
    part[:] = 7
    assert part.tobytes() == b"\7" * 10
    assert path.read_bytes() == bytes(range(256)) * 1000
    del part
    gc.collect()
    assert not is_mapped(path)
    with pytest.raises(OSError, match="Bad file descriptor: 'name'"):
        mapped("name", -1, 10)


def test_tensors_that_no_writer_aligned_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    values = np.arange(30, dtype=np.float32)
    entries = {
        "mask": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "weight": {"dtype": "F32", "shape": [5, 6], "data_offsets": [3, 123]},
    }
    text = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2\3" + values.tobytes())
    opened, expected = open_ingredient(str(path)), load_file(path)
    assert torch.equal(opened.read("mask"), expected["mask"])
    assert torch.equal(opened.read("weight").view(5, 6), expected["weight"])
    found = opened.read_array("weight", 7, 20, "float64")
    assert found.flags.aligned
    assert found.tolist() == values[7:20].tolist()
