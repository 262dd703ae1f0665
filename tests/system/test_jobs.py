"""`ray job submit` to a real head with zero CPUs and a token; the actors run on a worker node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import ROOT, free_port, steps_saved, values

pytestmark = pytest.mark.slow
LEARN = {"learn": {"batch_size": 2, "epochs": 8}}
TOKEN = "token-of-the-test-" + "x" * 20


class Head:
    """A Ray head and one worker node, as child processes."""

    def __init__(self, temp: str) -> None:
        self.port, self.dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": self.url}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": temp}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start(
            "--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={temp}", "--num-cpus=0",
            f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
        )  # fmt: skip
        self.wait(lambda: self.get("/api/version").status == 200)
        self.start(
            f"--address=127.0.0.1:{self.port}", f"--temp-dir={temp}w", "--num-cpus=2",
            f"--dashboard-agent-listen-port={free_port()}", f"--runtime-env-agent-port={free_port()}",
        )  # fmt: skip

    def start(self, *arguments: str) -> None:
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]
        log = open(Path(self.environment["RAY_TMPDIR"]) / f"start{len(self.processes)}.log", "wb")  # noqa: SIM115
        self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    def get(self, path: str, token: str = TOKEN) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return urllib.request.urlopen(request, timeout=10)

    def wait(self, ready: Callable[[], bool], seconds: int = 90) -> None:
        """Wait until `ready` returns True; a failed request to the head counts as False."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert all(p.poll() is None for p in self.processes)
            with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                if ready():
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds} s")

    def job(self, *command: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "RAY_AUTH_TOKEN": token}
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *command],
            env=environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip

    def details(self, submission: str) -> dict[str, Any]:
        return json.load(self.get(f"/api/jobs/{submission}"))

    def close(self) -> None:
        everyone = [child for p in self.processes for child in psutil.Process(p.pid).children(recursive=True)]
        for process in (*self.processes, *everyone):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()
        psutil.wait_procs(everyone, timeout=20)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    temp = tempfile.mkdtemp(prefix="rj", dir="/tmp")
    started = Head(temp)
    try:
        yield started
    finally:
        started.close()
        for left in (temp, f"{temp}w"):
            shutil.rmtree(left, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a working directory as a user submits it: the entry points, a recipe, and the module of the model."""
    work = tmp_path_factory.mktemp("job") / "work"
    shutil.copytree(ROOT / "jobs", work)
    shutil.copy(ROOT / "tests" / "tiny.py", work / "my_model.py")
    (work / "recipe.yaml").write_text(yaml.safe_dump(values(zoo, model="my_model:build", **LEARN)))
    return work


@pytest.fixture(scope="module")
def alone(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> np.ndarray:
    """Compute the coefficients of the same recipe without a job."""
    out = run(make_recipe(values(zoo, **LEARN)), tmp_path_factory.mktemp("alone") / "out").out
    return load_coefficients(Path(out) / "coefficients.safetensors").values


def submit(head: Head, folder: Path, name: str, *arguments: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
    options = ["--submission-id", name, "--working-dir", str(folder), *([] if wait else ["--no-wait"])]
    return head.job("submit", *options, "--", sys.executable, "learn_soup.py", *arguments)


def test_a_job_is_bit_identical_to_a_local_run_and_logs_lines(
    head: Head, folder: Path, tmp_path: Path, alone: np.ndarray
) -> None:
    done = submit(head, folder, "learns", "recipe.yaml", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    logs = head.job("logs", "learns").stdout
    assert f"Wrote {tmp_path}/out/model.safetensors" in logs
    assert "\r" not in logs
    assert "\x1b[2K" not in logs
    assert "Traceback" not in logs
    np.testing.assert_array_equal(load_coefficients(tmp_path / "out" / "coefficients.safetensors").values, alone)
    again = submit(head, folder, "again", "recipe.yaml", str(tmp_path / "out"))
    assert again.returncode == 0
    assert "is complete; nothing was run" in head.job("logs", "again").stdout


def test_a_failed_job_has_the_exit_code_and_the_message_of_the_command(head: Head, folder: Path, tmp_path: Path) -> None:
    done = submit(head, folder, "fails", "recipe.yaml", str(tmp_path / "out"), f"data.fit={tmp_path}/nothing.npz")
    assert done.returncode != 0
    details = head.details("fails")
    assert details["status"] == "FAILED"
    assert details["driver_exit_code"] == 2
    assert not (tmp_path / "out").exists()  # found before anything was written
    logs = head.job("logs", "fails").stdout
    assert "nothing.npz: does not exist on" in logs
    assert "Traceback" not in logs


@pytest.mark.parametrize("token", ["", "wrong-" + TOKEN])
def test_requests_without_the_token_are_refused(head: Head, folder: Path, token: str, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        head.get("/api/jobs/", token=token)
    assert refused.value.code in ((401,) if not token else (401, 403))
    if token:
        done = head.job("submit", "--working-dir", str(folder), "--", "true", token=token)
        assert done.returncode != 0


def test_a_stopped_job_resumes_and_is_bit_identical(head: Head, folder: Path, tmp_path: Path, alone: np.ndarray) -> None:
    assert submit(head, folder, "stops", "recipe.yaml", str(tmp_path / "out"), wait=False).returncode == 0

    def has_saved_a_step() -> bool:
        if steps_saved(tmp_path / "out"):
            return True
        assert head.details("stops")["status"] in ("PENDING", "RUNNING"), head.job("logs", "stops").stdout
        return False

    head.wait(has_saved_a_step, 300)
    assert head.job("stop", "stops").returncode == 0
    head.wait(lambda: head.details("stops")["status"] in ("STOPPED", "SUCCEEDED", "FAILED"), 300)
    assert head.details("stops")["status"] == "STOPPED"
    done = submit(head, folder, "resumes", "recipe.yaml", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_array_equal(load_coefficients(tmp_path / "out" / "coefficients.safetensors").values, alone)
