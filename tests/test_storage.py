"""Everything in a bucket: a real S3 endpoint in a child process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ray_soup import folder, storage
from ray_soup.cache import drained
from ray_soup.checkpoints import open_ingredient, open_ingredients, sha256_file
from ray_soup.errors import RecipeError, SoupError
from ray_soup.folder import Lease, locked
from ray_soup.pipeline import run
from ray_soup.recipe import make_recipe
from tests.conftest import ROOT, kill_tree, put, ray_soup, steps_saved, values


def call(*arguments: str, cache: Path | None = None) -> dict[str, Any]:
    environment = {**os.environ, **({"RAY_SOUP_CACHE": str(cache)} if cache else {})}
    done = subprocess.run(ray_soup(*arguments, "--json"), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "secret-of-the-test" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_uploaded_is_listed_and_read_back(s3: str, tmp_path: Path) -> None:
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
    assert Path(drained(storage.local_copy(f"{s3}/a/b/large.bin"))).read_bytes() == data
    storage.remove(f"{s3}/a/model_1.pt")
    storage.remove(f"{s3}/a/model_1.pt")
    assert storage.listdir(f"{s3}/a") == ["b", "model_12.pt"]
    with pytest.raises(FileNotFoundError):
        storage.stat(f"{s3}/a/model_1.pt")
    with pytest.raises(SoupError, match="changed while it was in use"):
        storage.RemoteFile(f"{s3}/a/b/large.bin", 10**9).read(len(data) - 5, 10)


def test_ingredients_in_a_bucket_are_those_of_the_disk(s3: str, zoo: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("uri", ["s3://AKIA1:topsecret@bucket/zoo", "s3://bucket/zoo?secret_key=topsecret"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(RecipeError, match="credentials and options do not belong into a URI") as error:
        open_ingredients(uri)
    assert "topsecret" not in str(error.value)
    assert "bucket/zoo" in str(error.value)


class Proxy:
    """A TCP relay before the endpoint that cuts the first connections, or is slow."""

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


def test_a_storage_that_fails_is_asked_again_and_then_named(
    s3: str, endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0, 0, 0))
    storage.write_bytes(b"here", f"{s3}/file")
    for cuts, works in ((4, True), (10**9, False)):  # each of our tries is two of the SDK's
        proxy = Proxy(int(endpoint["AWS_ENDPOINT_URL"].rpartition(":")[2]), cuts)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        storage._s3.cache_clear()
        if works:
            assert storage.read_bytes(f"{s3}/file") == b"here"
            assert proxy.cuts == 0
        else:
            with pytest.raises(SoupError, match=f"The storage failed at {s3}/file, 4 times"):
                storage.read_bytes(f"{s3}/file")
        proxy.server.close()
    storage._s3.cache_clear()


@pytest.mark.parametrize("remote", [False, True])
def test_a_run_that_was_taken_for_dead_writes_no_more(
    remote: bool, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "BEAT_S", 0.2)
    out = f"{s3}/frozen" if remote else str(tmp_path / "out")
    other = json.dumps({"host": "another-host", "pid": 1, "run": "theirs", "beat": 7}).encode()

    def finish() -> None:
        with locked(out) as place:
            (place / "new").mkdir()
            storage.write_bytes(other, f"{out}/state/lease")  # while this process was stopped
            time.sleep(1)
            folder.publish(make_recipe({"model": "a.b:c"}), [], {}, place / "new", place)

    with pytest.raises(SoupError, match="process 1 on another-host took its place"):
        finish()
    assert storage.read_bytes(f"{out}/state/lease") == other
    assert not storage.exists(f"{out}/run.json")


@pytest.mark.parametrize("remote", [False, True])
def test_a_lease_keeps_others_out_and_a_dead_one_is_taken_over(
    remote: bool, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "LEASE_S", 3)
    monkeypatch.setattr(folder, "BEAT_S", 0.5)
    out = f"{s3}/out" if remote else str(tmp_path / "out")
    (tmp_path / "out" / "state").mkdir(parents=True)
    said: list[str] = []

    def watch(what: str, done: int, total: int) -> None:
        said.append(what)

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        lease = Lease(f"{out}/state/lease", watch)
        lease.__enter__()
    with pytest.raises(RecipeError, match=r"Another run is at work in .*/out: process \d+ on another-host"), locked(out):
        pass
    lease._stop.set()  # it dies without a word
    lease._thread.join()
    with locked(out, watch) as place:
        assert "is the run on another-host alive" in said
        (place / "run.json").write_text("{}")
        (place / "state" / "learn.pt").write_bytes(b"x")
        if remote:
            time.sleep(1.5)
            assert storage.read_bytes(f"{out}/state/learn.pt") == b"x"  # while the run is at work
            assert not storage.exists(f"{out}/run.json")
    assert storage.read_bytes(f"{out}/run.json") == b"{}"
    assert not storage.exists(f"{out}/state/lease")
    with locked(out) as place:  # and is there again
        assert (place / "state" / "learn.pt").read_bytes() == b"x"
        (place / "state" / "learn.pt").unlink()
    assert not storage.exists(f"{out}/state/learn.pt")


def in_the_bucket(zoo: Path, s3: str, tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """Recipes for the zoo on the disk and for the same in the bucket; one ingredient is a torch file in both."""
    here = tmp_path / "here"
    (here / "zoo").mkdir(parents=True)
    for k in range(1, 5):
        shutil.copy(zoo / "zoo" / f"model_{k}.safetensors", here / "zoo")
    torch.save(load_file(zoo / "zoo" / "model_0.safetensors"), here / "zoo" / "model_0.pt")
    for name in ("heldout.npz", "test.npz"):
        shutil.copy(zoo / name, here)
    put(here, f"{s3}/data")
    recipe = values(zoo, **changes)
    for name, base in (("local", str(here)), ("remote", f"{s3}/data")):
        data = {"fit": f"{base}/heldout.npz", "select": 0.25, "test": f"{base}/test.npz"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "ingredients": f"{base}/zoo", "data": data}))
    return tmp_path / "local.yaml", tmp_path / "remote.yaml"


def without_time(name: str) -> str:
    """TensorBoard's files are called after the second that they were begun in."""
    return name.partition(".tfevents.")[0]


def coefficients(place: str) -> torch.Tensor:
    path = drained(storage.local_copy(f"{place}/coefficients.safetensors"))
    return load_file(path)["coefficients"]


def test_a_bucket_with_something_else_in_it_is_refused(s3: str, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "SMALL", 10)
    storage.write_bytes(b"somebody's own", f"{s3}/mine/model.safetensors")
    with pytest.raises(RecipeError, match=f"{s3}/mine is not empty and holds no run") as error:
        run(make_recipe(values(zoo)), f"{s3}/mine")
    assert "cache" not in str(error.value)
    assert storage.read_bytes(f"{s3}/mine/model.safetensors") == b"somebody's own"
    assert list(storage.walk(f"{s3}/mine")) == ["model.safetensors"]


@pytest.mark.slow
def test_a_soup_from_a_bucket_into_a_bucket_has_the_bits_of_the_disk(zoo: Path, s3: str, tmp_path: Path) -> None:
    local, remote = in_the_bucket(zoo, s3, tmp_path)
    ours = call("learn", str(local), str(tmp_path / "out"))
    theirs = call("learn", str(remote), f"{s3}/out", cache=tmp_path / "cache")
    figures = ("select_nll", "test_nll", "test_accuracy")
    assert [ours["results"][0][f] for f in figures] == [theirs["results"][0][f] for f in figures]
    assert torch.equal(coefficients(str(tmp_path / "out")), coefficients(f"{s3}/out"))
    there = set(storage.walk(f"{s3}/out"))
    here = [str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert {without_time(name) for name in there} == {without_time(name) for name in here} - {"state/lock"}
    copies = {f.name for f in (tmp_path / "cache" / "files").rglob("*") if f.is_file()} - {"in_use"}
    assert {name for name in copies if not name.endswith(".lock")} == {"model_0.pt", "heldout.npz", "test.npz"}
    assert call("learn", str(remote), f"{s3}/out", cache=tmp_path / "fresh")["run"] == theirs["run"]  # is complete
    assert call("verify", f"{s3}/out")["verified"]
    call("bake", f"{s3}/out", f"{s3}/again")
    text = b"".join(storage.read_bytes(f"{s3}/out/{name}") for name in there if not name.endswith(".safetensors"))
    assert b"of-the-test" not in text


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_bucket_on_another_machine(zoo: Path, s3: str, tmp_path: Path) -> None:
    local, remote = in_the_bucket(zoo, s3, tmp_path, learn={"batch_size": 4, "epochs": 20})
    command = ray_soup("learn", str(remote), f"{s3}/out")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    while not steps_saved(f"{s3}/out"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    kill_tree(process)
    assert not storage.exists(f"{s3}/out/run.json")
    call("learn", str(remote), f"{s3}/out", cache=tmp_path / "fresh")
    call("learn", str(local), str(tmp_path / "out"))
    assert torch.equal(coefficients(str(tmp_path / "out")), coefficients(f"{s3}/out"))
    assert json.loads(storage.read_bytes(f"{s3}/out/run.json"))["exit"] == 0


@pytest.mark.slow
def test_a_search_into_a_bucket(zoo: Path, s3: str, tmp_path: Path) -> None:
    _, remote = in_the_bucket(zoo, s3, tmp_path, search={"learn.lr": {"grid": [0.03]}, "scheduler": "none"})
    found = call("search", str(remote), f"{s3}/out")["run"]["search"]
    assert [t["error"] for t in found["trials"]] == [None, None]
    assert call("verify", f"{s3}/out")["verified"]
    assert not [name for name in storage.walk(f"{s3}/out/state") if name.startswith(("trials/", "tune/"))]
