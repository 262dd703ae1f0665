"""Everything in a bucket: an S3 endpoint in a child process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import lease, mirror, storage
from ray_soup.io.lease import Lease, state_folder
from ray_soup.io.progress import drain
from ray_soup.recipe import load_recipe, make_recipe
from ray_soup.soups.output import Output, open_output
from ray_soup.soups.records import write_begun
from ray_soup.soups.run import run
from tests.conftest import ROOT, kill_tree, put, ray_soup, steps_saved, values
from tests.ray.events import wait_for
from tests.stopping import running, stop
from tests.system.command import call as here_call
from tests.system.command import write_recipe

DEADLINE_S = 120


def call(*arguments: str, cache: Path | None = None) -> dict[str, Any]:
    """Run `ray-soup` in a child process, which must succeed; the JSON object that it prints."""
    environment = {**os.environ, **({"RAY_SOUP_CACHE": str(cache)} if cache else {})}
    done = subprocess.run(ray_soup(*arguments, "--json"), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "secret-of-the-test" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Output folders under a lease


@pytest.fixture(params=["local", "remote"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output folder, local or in a bucket."""
    return f"{request.getfixturevalue('s3')}/out" if request.param == "remote" else str(tmp_path / "out")


def take_over(output: Output) -> Lease:
    """Let another run take over, until the heartbeat of this run has noticed."""
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        other = Lease(output.lease._out)
    assert other.claim.take(other.record, other.claim.read())
    other.claim.inherit(other.record)
    output.lease._thread.join(DEADLINE_S)
    assert not output.lease._thread.is_alive()
    return other


def test_a_run_that_was_presumed_dead_and_taken_over_writes_nothing_more(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    successors: list[Lease] = []

    def finish() -> None:
        with open_output(out) as output:
            staging = output.staging()
            successors.append(take_over(output))
            output.publish(make_recipe({"model": "a.b:c"}), [], {}, staging)

    with pytest.raises(SoupError, match=r"process \d+ on another-host took over .*This run writes nothing more there"):
        finish()
    assert successors[0].claim.other(successors[0].record) is None
    assert not storage.exists(f"{out}/run.json")


def test_a_lease_keeps_others_out_and_is_taken_over_without_a_heartbeat(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 3)
    monkeypatch.setattr(lease, "BEAT_S", 0.5)
    if not storage.is_remote(out):
        Path(out, "state").mkdir(parents=True)
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        said.append(what)

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        other = Lease(out, progress)
        other.__enter__()
    with pytest.raises(RecipeError, match=r"Another run is using .*/out: process \d+ on another-host"), open_output(out):
        pass
    other._stop.set()  # its process dies and leaves the lease behind
    other._thread.join()
    lease._ACTIVE.clear()
    with open_output(out, progress) as output:
        assert "waiting for a heartbeat of the run on another-host" in said
        write_begun({"recipe": "", "ingredients": []}, output.state("begun.json"))
        (output.folder / "run.json").write_text("{}")
        output.state("learn.pt").write_bytes(b"x")
        if storage.is_remote(out):
            deadline = time.monotonic() + DEADLINE_S
            while not storage.exists(f"{state_folder(out)}/learn.pt"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert storage.read_bytes(f"{state_folder(out)}/learn.pt") == b"x"  # uploaded while the run is active
            assert not storage.exists(f"{out}/run.json")
    assert storage.read_bytes(f"{out}/run.json") == b"{}"
    with open_output(out) as output:  # a rerun finds its state
        assert output.state("learn.pt").read_bytes() == b"x"
        output.state("learn.pt").unlink()
    assert not storage.exists(f"{state_folder(out)}/learn.pt")


def test_a_folder_of_something_else_in_a_bucket_is_refused(s3: str, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SMALL", 10)
    storage.write_bytes(b"somebody's own", f"{s3}/mine/model.safetensors")
    with pytest.raises(RecipeError, match=f"{s3}/mine is not empty and was not written by ray_soup") as error:
        run(make_recipe(values(zoo)), f"{s3}/mine")
    assert "cache" not in str(error.value)
    assert storage.read_bytes(f"{s3}/mine/model.safetensors") == b"somebody's own"
    assert list(storage.walk(f"{s3}/mine")) == ["model.safetensors"]


# Whole runs


def in_the_bucket(zoo: Path, s3: str, tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """Write recipes for a zoo on disk and for a copy of it in the bucket; one ingredient is a torch file in both."""
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
    """A file name without the time that TensorBoard adds to it."""
    return name.partition(".tfevents.")[0]


def coefficients(place: str) -> torch.Tensor:
    path = drain(storage.local_copy(f"{place}/coefficients.safetensors"))
    return load_file(path)["coefficients"]


@pytest.mark.slow
def test_a_soup_from_a_bucket_into_a_bucket_is_bit_identical_to_one_on_disk(
    zoo: Path, s3: str, tmp_path: Path, cluster: None
) -> None:
    local, remote = in_the_bucket(zoo, s3, tmp_path)
    (ours, *_) = run(load_recipe(local), tmp_path / "out").rows
    theirs = call("learn", str(remote), f"{s3}/out", cache=tmp_path / "cache")
    figures = ("select_nll", "test_nll", "test_accuracy")
    assert [ours[f] for f in figures] == [theirs["results"][0][f] for f in figures]
    assert torch.equal(coefficients(str(tmp_path / "out")), coefficients(f"{s3}/out"))
    there = set(storage.walk(f"{s3}/out"))
    here = [str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()]
    own = state_folder(f"{s3}/out").removeprefix(f"{s3}/out/")
    names = {without_time(name).replace(own, "state") for name in there}
    assert names == {without_time(name) for name in here} | {"state/lease"}
    copies = tmp_path / "cache" / "files"  # KEY.lock, KEY/entry.json, KEY/in_use, KEY/copy/NAME
    inside = {f.relative_to(copies).parts[1:] for f in copies.rglob("*") if f.is_file() and f.parent != copies}
    fetched = {("copy", name) for name in ("model_0.pt", "heldout.npz", "test.npz")}  # .safetensors are read in place
    assert inside == fetched | {("entry.json",), ("in_use",)}
    assert call("learn", str(remote), f"{s3}/out", cache=tmp_path / "fresh")["run"] == theirs["run"]  # is complete
    assert here_call("verify", f"{s3}/out").exit_code == 0
    assert here_call("bake", f"{s3}/out", f"{s3}/again").exit_code == 0
    text = b"".join(storage.read_bytes(f"{s3}/out/{name}") for name in there if not name.endswith(".safetensors"))
    assert b"of-the-test" not in text


@pytest.mark.slow
def test_a_killed_run_resumes_from_the_bucket_on_another_machine(zoo: Path, s3: str, tmp_path: Path, cluster: None) -> None:
    local, remote = in_the_bucket(zoo, s3, tmp_path, learn={"batch_size": 8, "epochs": 36})
    command = ray_soup("learn", str(remote), f"{s3}/out")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: steps_saved(f"{s3}/out"), process)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert not storage.exists(f"{s3}/out/run.json")
    call("learn", str(remote), f"{s3}/out", cache=tmp_path / "fresh")
    run(load_recipe(local), tmp_path / "out")
    assert torch.equal(coefficients(str(tmp_path / "out")), coefficients(f"{s3}/out"))
    assert json.loads(storage.read_bytes(f"{s3}/out/run.json"))["exit"] == 0


@contextmanager
def stalling(endpoint: str, name: str) -> Iterator[tuple[str, threading.Event]]:
    """Pass requests on to an S3 server until one uploads the object `name`, which gets no answer.

    The value is the address to use in place of `endpoint`, and an event that is set once the upload stalls.
    """
    stalled, host, port = threading.Event(), *endpoint.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, upward: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if upward and data[:4] in (b"PUT ", b"POST") and name.encode() in data.partition(b"\r\n")[0]:
                    stalled.set()
                    return  # the sockets stay open
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection((host, int(port)))
                for arguments in ((client, server, True), (server, client, False)):
                    threading.Thread(target=pump, args=arguments, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", stalled


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_uploads_resumes_to_the_same_bits(
    zoo: Path, s3: str, endpoint: dict[str, str], tmp_path: Path, soup: Path
) -> None:
    """The storage answers no more when the soup, and the second time run.json, is uploaded at the end."""
    recipe = write_recipe(tmp_path, values(zoo, learn__lr=0.05))
    for number, name in ((signal.SIGTERM, "/out/model.safetensors"), (signal.SIGINT, "/out/run.json")):
        with stalling(endpoint["AWS_ENDPOINT_URL"], name) as (address, stalled):
            environment = {**os.environ, "AWS_ENDPOINT_URL": address}
            with running(ray_soup("learn", str(recipe), f"{s3}/out"), cwd=ROOT, env=environment) as process:
                wait_for(stalled.is_set, process)
                stop(process, number)
        assert not storage.exists(f"{s3}/out/run.json")
    found = run(load_recipe(recipe), f"{s3}/out").rows
    assert torch.equal(coefficients(f"{s3}/out"), coefficients(str(soup)))
    alone = json.loads((soup / "results.jsonl").read_text().splitlines()[0])
    assert found[0]["test_nll"] == alone["test_nll"]
    assert here_call("verify", f"{s3}/out").exit_code == 0
