from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ray_soup.io.find import open_ingredients
from ray_soup.io.hashing import StreamingHash, combined_sha256, hash_ingredients, sha256_file
from ray_soup.io.storage import LocalFile


def test_a_streaming_hash_equals_the_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = np.random.default_rng(0).bytes(1000)
    path.write_bytes(data)
    streaming = StreamingHash(LocalFile(str(path)), 1000)
    for start, stop in [(10, 20), (20, 300), (301, 999)]:
        streaming.update(start, memoryview(data)[start:stop])
    assert streaming.hexdigest() == sha256_file(str(path)) == hashlib.sha256(data).hexdigest()
    streaming.update(5, memoryview(data)[5:11])
    assert not streaming.in_order


def test_ingredients_are_hashed_in_order_with_progress_in_bytes(tmp_path: Path) -> None:
    for k in range(3):
        save_file({"a": torch.full((5,), k)}, tmp_path / f"{k}.safetensors")
    ingredients, seen = open_ingredients(str(tmp_path)), []
    digests = hash_ingredients(ingredients, lambda *news: seen.append(news))
    assert digests == [hashlib.sha256((tmp_path / f"{k}.safetensors").read_bytes()).hexdigest() for k in range(3)]
    total = sum(i.nbytes for i in ingredients)
    assert ("hashing", total, total) in seen


def test_several_files_have_the_hash_of_the_list_of_their_hashes() -> None:
    assert combined_sha256(["a"]) == "a"
    assert combined_sha256(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
