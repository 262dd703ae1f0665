"""Remote storage, against a real S3 endpoint in a child process."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import objects, storage
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
        assert sorted(storage.glob(f"{base}/*/*")) == [f"{base}/a/{name}" for name in ("b", "model_1.pt", "model_2.pt")]
        assert storage.glob(f"{base}/*/b") == storage.glob(f"{base}/**/b") == [f"{base}/a/b"]
        assert storage.glob(f"{base}/a/*/b") == storage.glob(f"{base}/*/model_1.pt/*") == []
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
    with pytest.raises(RecipeError, match=r"nowhere://a/b: cannot open this storage .*Use s3://, gs://, az://"):
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
    """A TCP relay before the endpoint that cuts connections: the first, and `short` more after `most` bytes of answers."""

    def __init__(self, target: int, cuts: int, most: int = 1 << 62, short: int = 1 << 62) -> None:
        self.cuts, self.target, self.most, self.short = cuts, target, most, short
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
            self.short -= 1
            most_back = self.most if self.short >= 0 else 1 << 62
            for one, other, most in ((client, onward, 1 << 62), (onward, client, most_back)):
                threading.Thread(target=self.relay, args=(one, other, most), daemon=True).start()

    @staticmethod
    def relay(source: socket.socket, target: socket.socket, most: int) -> None:
        with suppress(OSError):
            while most > 0 and (data := source.recv(min(most, 1 << 16))):
                target.sendall(data)
                most -= len(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


QUICK = {"max_retries": 3, "backoff": {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5)}}


def test_failed_requests_are_retried_and_then_named(
    s3: str, endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "RETRY", QUICK)
    storage.write_bytes(b"here", f"{s3}/file")
    for cuts, works in ((3, True), (10**9, False)):
        proxy = Proxy(int(endpoint["AWS_ENDPOINT_URL"].rpartition(":")[2]), cuts)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        if works:
            assert storage.read_bytes(f"{s3}/file") == b"here"
            assert proxy.cuts == 0
        else:
            with pytest.raises(SoupError, match=rf"The storage failed at {s3}/file after 4 attempts in \d+ s: ") as error:
                storage.read_bytes(f"{s3}/file")
            assert error.value.exit_code == 1
        proxy.server.close()


def test_a_file_that_changes_while_it_is_copied_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART", 1000)
    storage.write_bytes(bytes(5000), f"{s3}/file")
    work = storage.local_copy(f"{s3}/file")
    next(work)
    storage.write_bytes(bytes([1]) * 6000, f"{s3}/file")
    with pytest.raises(SoupError, match=rf"{s3}/file changed while it was copied\. Rerun"):
        drain(work)
    assert Path(drain(storage.local_copy(f"{s3}/file"))).read_bytes() == bytes([1]) * 6000


def test_a_body_that_is_cut_is_read_on(s3: str, endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(1 << 22)
    storage.write_bytes(data, f"{s3}/file")
    proxy = Proxy(int(endpoint["AWS_ENDPOINT_URL"].rpartition(":")[2]), 0, most=1 << 20)
    monkeypatch.setattr(objects, "RETRY", {**QUICK, "max_retries": 10})
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    assert storage.read_bytes(f"{s3}/file") == data
    proxy.server.close()


def test_a_list_that_is_cut_is_asked_for_once_more(
    s3: str, endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x", "a/y", "b"):
        storage.write_bytes(b"here", f"{s3}/{name}")
    monkeypatch.setattr(objects, "PAUSES_S", (0.0,) * 2)
    port = int(endpoint["AWS_ENDPOINT_URL"].rpartition(":")[2])
    for ask, answer in (
        (lambda: storage.listdir(s3), ["a", "b"]),
        (lambda: list(storage.walk(s3)), ["a/x", "a/y", "b"]),
        (lambda: storage.isdir(f"{s3}/a"), True),
    ):
        for short, works in ((2, True), (3, False)):
            proxy = Proxy(port, 0, 400, short)  # inside the body
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            if works:
                assert ask() == answer
                assert proxy.short < 0
            else:
                with pytest.raises(SoupError, match=f"The storage failed at {s3}"):
                    ask()
            proxy.server.close()


def test_a_bucket_that_does_not_exist_is_refused_at_once(s3: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    missing = f"{s3}-2"
    for action in (
        lambda: storage.exists(missing),
        lambda: storage.listdir(f"{missing}/a"),
        lambda: storage.walk(missing),
        lambda: storage.glob(f"{missing}/*.pt"),
        lambda: storage.write_bytes(b"x", f"{missing}/a"),
        lambda: storage.upload(tmp_path / "file", f"{missing}/a"),
        lambda: storage.remove(f"{missing}/a"),
        lambda: open_ingredients(f"{missing}/zoo"),
    ):
        with pytest.raises(RecipeError, match=rf"{missing}.*: the bucket does not exist\. Create it, or fix the URI\."):
            action()


def test_what_stands_for_a_folder_in_other_tools_is_no_file(s3: str) -> None:
    """The console of AWS and pyarrow put an empty object in its place, whose name ends in a slash."""
    system, path = storage.filesystem(s3)
    system.create_dir(f"{path}/a/b", recursive=True)
    storage.write_bytes(b"", f"{s3}/a/empty")
    storage.write_bytes(b"x", f"{s3}/c/file")
    system.create_dir(f"{path}/c")
    assert list(storage.walk(s3)) == ["a/empty", "c/file"]
    assert storage.listdir(s3) == ["a", "c"]
    assert storage.listdir(f"{s3}/a") == ["b", "empty"]
    assert storage.listdir(f"{s3}/a/b") == []
    assert storage.isdir(f"{s3}/a/b")
    assert not storage.isfile(f"{s3}/a/b")
