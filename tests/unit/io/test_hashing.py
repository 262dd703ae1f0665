from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError
from ray_soup.io import hashing
from ray_soup.io.cache import cache_at
from ray_soup.io.find import open_ingredients
from ray_soup.io.hashing import StreamingHash, combined_sha256, digest_key, hash_ingredients, known_digest, sha256_file
from ray_soup.io.storage import LocalFile
from ray_soup.mixing.bake import bake
from ray_soup.mixing.coefficients import Coefficients


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


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of 3 checkpoints, whose digests can be remembered at once, and an empty cache."""
    monkeypatch.setattr(hashing, "SETTLED_S", 0)
    for k in range(3):
        save_file({"a": torch.full((1 << 16,), float(k)), "b": torch.full((3,), k)}, tmp_path / f"{k}.safetensors")
    with cache_at(tmp_path / "cache"):
        yield tmp_path


def digests_of(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / f"{k}.safetensors").read_bytes()).hexdigest() for k in range(3)]


def test_a_file_is_read_again_only_if_it_changed_or_that_is_asked_for(
    settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: str, count: Callable[[int], None] | None = None) -> str:
        read.append(path)
        return sha256_file(path, count)

    monkeypatch.setattr(hashing, "sha256_file", counted)
    pattern, first = str(settled / "*.safetensors"), settled / "0.safetensors"
    for _ in range(2):
        assert hash_ingredients(open_ingredients(pattern)) == digests_of(settled)
    assert len(read) == 3
    assert hash_ingredients(open_ingredients(pattern), reread=True) == digests_of(settled)
    assert len(read) == 6
    before, data = first.stat(), bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert hash_ingredients(open_ingredients(pattern)) == digests_of(settled)
    assert read[6:] == [str(first)]
    for file in (settled / "cache" / "sha256").iterdir():
        file.write_text("torn")
    assert hash_ingredients(open_ingredients(pattern)) == digests_of(settled)
    assert len(read) == 10


def test_a_file_that_changed_a_moment_ago_is_not_remembered(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "SETTLED_S", 60)
    ingredients = open_ingredients(str(settled / "*.safetensors"))
    assert hash_ingredients(ingredients) == digests_of(settled)
    assert [known_digest(digest_key(i)) for i in ingredients] == [None] * 3


def test_digests_are_right_where_the_cache_cannot_be_written(settled: Path) -> None:
    (settled / "cache").write_text("not a folder")
    for _ in range(2):
        assert hash_ingredients(open_ingredients(str(settled / "*.safetensors"))) == digests_of(settled)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_baking_computes_the_digests_in_its_own_pass(settled: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_soup.mixing.bake.RANGE", 1 << 13)  # several windows
    states = [{"a": torch.full((1 << 17,), float(k)), "b": torch.full((3,), k)} for k in range(3)]
    for k, state in enumerate(states):
        torch.save(state, settled / f"{k}.pt")
    ingredients = open_ingredients(str(settled / f"*.{suffix}"))
    coefficients = Coefficients(np.full((3, 1), 1 / 3), ("0", "1", "2"), ("all",), {"a": 0})
    bake(coefficients, ingredients, settled / "soup.out")
    files = [settled / f"{k}.{suffix}" for k in range(3)]
    assert [known_digest(digest_key(i)) for i in ingredients] == [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def test_no_digest_is_remembered_of_a_file_that_changes_while_it_is_baked(settled: Path) -> None:
    ingredients = open_ingredients(str(settled / "*.safetensors"))
    coefficients = Coefficients(np.full((3, 1), 1 / 3), ("0", "1", "2"), ("all",), {"a": 0})

    def touch(done: int, total: int) -> None:
        time.sleep(0.02)  # the clock of a file system ticks every 10 ms or less often
        os.utime(settled / "1.safetensors")

    with pytest.raises(IngredientError, match=r"1\.safetensors changed while it was in use"):
        bake(coefficients, ingredients, settled / "soup.out", progress=touch)
    assert known_digest(digest_key(open_ingredients(str(settled / "1.safetensors"))[0])) is None
