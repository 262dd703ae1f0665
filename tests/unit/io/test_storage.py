"""Remote storage, against a real S3 endpoint in a child process."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.find import open_ingredients
from ray_soup.io.hashing import sha256_file
from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.progress import drain
from tests.conftest import put


def test_uploaded_files_are_listed_and_read_back(s3: str, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((1 << 24) + 12345)  # more than one part
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", f"{s3}/a/b/large.bin")
    storage.write_bytes(b"small", f"{s3}/a/model_1.pt")
    storage.write_bytes(b"", f"{s3}/a/model_12.pt")
    assert storage.stat(f"{s3}/a/b/large.bin").size == len(data)
    assert storage.read_bytes(f"{s3}/a/b/large.bin") == data
    assert bytes(storage.RemoteFile(f"{s3}/a/b/large.bin", len(data)).read(77, 1000)) == data[77:1077]
    assert sha256_file(f"{s3}/a/b/large.bin") == sha256_file(str(tmp_path / "large"))
    assert storage.listdir(f"{s3}/a") == ["b", "model_1.pt", "model_12.pt"]
    assert list(storage.walk(f"{s3}/a")) == ["b/large.bin", "model_1.pt", "model_12.pt"]
    assert storage.isdir(f"{s3}/a")
    assert storage.isfile(f"{s3}/a/model_1.pt")
    assert not storage.exists(f"{s3}/a/nothing")
    assert storage.glob(f"{s3}/a/model_?.pt") == [f"{s3}/a/model_1.pt"]
    assert storage.glob(f"{s3}/*/*/*.bin") == storage.glob(f"{s3}/**/*.bin") == [f"{s3}/a/b/large.bin"]
    assert Path(drain(storage.local_copy(f"{s3}/a/b/large.bin"))).read_bytes() == data
    storage.remove(f"{s3}/a/model_1.pt")
    storage.remove(f"{s3}/a/model_1.pt")
    assert storage.listdir(f"{s3}/a") == ["b", "model_12.pt"]
    with pytest.raises(FileNotFoundError):
        storage.stat(f"{s3}/a/model_1.pt")
    with pytest.raises(SoupError, match="changed while it was in use"):
        storage.RemoteFile(f"{s3}/a/b/large.bin", 10**9).read(len(data) - 5, 10)


def test_a_local_copy_of_a_folder_or_file_is_made_once_for_each_version(s3: str) -> None:
    """A file with the name of the cache's own record comes back unchanged."""
    for name, text in (("entry.json", b"first"), ("deep/in_use", b"second")):
        storage.write_bytes(text, f"{s3}/data/{name}")
    folder = Path(drain(storage.local_copy(f"{s3}/data")))
    assert folder.name == "data"
    assert {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()} == {
        "entry.json": b"first",
        "deep/in_use": b"second",
    }
    file = drain(storage.local_copy(f"{s3}/data/entry.json"))
    assert Path(file).read_bytes() == b"first"
    assert drain(storage.local_copy(f"{s3}/data/entry.json")) == file
    storage._HELD.clear()  # as in another process
    assert drain(storage.local_copy(f"{s3}/data/entry.json")) == file
    storage._HELD.clear()
    storage.write_bytes(b"other bytes", f"{s3}/data/entry.json")
    assert Path(drain(storage.local_copy(f"{s3}/data/entry.json"))).read_bytes() == b"other bytes"
    with pytest.raises(FileNotFoundError):
        drain(storage.local_copy(f"{s3}/nothing"))


def test_local_paths_and_uris_have_the_same_functions(s3: str, tmp_path: Path) -> None:
    for base in (str(tmp_path / "here"), s3):
        for name in ("a/model_1.pt", "a/model_2.pt", "a/b/notes"):
            storage.write_bytes(name.encode(), storage.join(base, *name.split("/")))
        assert storage.listdir(storage.join(base, "a")) == ["b", "model_1.pt", "model_2.pt"]
        assert storage.listdir(storage.join(base, "none")) == []
        assert list(storage.walk(base)) == ["a/b/notes", "a/model_1.pt", "a/model_2.pt"]
        assert sorted(storage.glob(f"{base}/a/model_[12].pt")) == [f"{base}/a/model_{k}.pt" for k in (1, 2)]
        assert b"".join(map(bytes, storage.chunks(f"{base}/a/b/notes"))) == b"a/b/notes"
        assert bytes(storage.open_file(f"{base}/a/b/notes", 9).read(2, 3)) == b"b/n"
        assert (storage.isdir(f"{base}/a"), storage.isfile(f"{base}/a"), storage.exists(f"{base}/a")) == (True, False, True)
        storage.remove(f"{base}/a/b/notes")
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{base}/a/b/notes")


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a/b/c.pt", "a/*/*.pt", True),
        ("a/b/c.pt", "a/*.pt", False),
        ("a/b/c.pt", "**/*.pt", True),
        ("a/b/c.pt", "a/**", True),
        ("c.pt", "**/c.pt", True),
        ("a/b/c.pt", "a/?/[cd].pt", True),
        ("a/b/c.pt", "a/b", False),
    ],
)
def test_patterns_match_as_in_a_shell(path: str, pattern: str, expected: bool) -> None:
    assert storage.matches(path, pattern) == expected


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(RecipeError, match=r"nowhere://a/b: cannot open this storage .*Use s3://, gs://"):
        storage.exists("nowhere://a/b")


def test_ingredients_in_a_bucket_equal_those_on_disk(s3: str, zoo: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(zoo / "zoo" / "model_7.safetensors")}, tmp_path / "model_8.pt")
    put(zoo / "zoo", f"{s3}/zoo")
    put(tmp_path, f"{s3}/zoo")
    remote = open_ingredients(f"{s3}/zoo")
    assert [i.name for i in remote] == [f"model_{k}" for k in range(9)]
    local = open_ingredient(str(zoo / "zoo" / "model_7.safetensors"))
    for found in remote[7:]:
        assert found.tensors.keys() == local.tensors.keys()
        assert all(torch.equal(found.read(name), local.read(name)) for name in local.tensors)
    assert [i.path for i in open_ingredients(f"{s3}/zoo/*.safetensors")] == [i.path for i in remote[:8]]
    with pytest.raises(RecipeError, match="no checkpoints at s3://"):
        open_ingredients(f"{s3}/zoo/x*")
    with pytest.raises(RecipeError, match="/nothing does not exist"):
        open_ingredients(f"{s3}/nothing")


class Proxy:
    """A TCP relay before the endpoint that cuts the first connections."""

    def __init__(self, target: int, cuts: int) -> None:
        self.cuts, self.target = cuts, target
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            if self.cuts > 0:
                self.cuts -= 1
                client.close()
                continue
            onward = socket.create_connection(("127.0.0.1", self.target))
            for one, other in ((client, onward), (onward, client)):
                threading.Thread(target=self.relay, args=(one, other), daemon=True).start()

    @staticmethod
    def relay(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()


def test_failed_requests_are_retried_and_then_named(
    s3: str, endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0, 0, 0))
    storage.write_bytes(b"here", f"{s3}/file")
    for cuts, works in ((4, True), (10**9, False)):  # each of our attempts is two of the SDK's
        proxy = Proxy(int(endpoint["AWS_ENDPOINT_URL"].rpartition(":")[2]), cuts)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        storage._s3.cache_clear()
        if works:
            assert storage.read_bytes(f"{s3}/file") == b"here"
            assert proxy.cuts == 0
        else:
            with pytest.raises(SoupError, match=f"The storage failed at {s3}/file after 4 attempts in 0 s"):
                storage.read_bytes(f"{s3}/file")
        proxy.server.close()
    storage._s3.cache_clear()
