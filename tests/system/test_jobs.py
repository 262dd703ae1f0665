"""`ray job submit` to a real head with zero CPUs and a token; the actors run on a worker node."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import ROOT, children_called, ray_soup, steps_saved, values
from tests.ports import free_port

pytestmark = pytest.mark.slow
LEARN = {"learn": {"batch_size": 2, "epochs": 8}}
TOKEN = "token-of-the-test-" + "x" * 20


class Head:
    """A Ray head and one worker node, as child processes of an interpreter."""

    def __init__(self, temp: str, python: str = sys.executable) -> None:
        self.python = python
        self.port, self.dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": self.url}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": temp}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment |= {"RAY_metrics_report_interval_ms": "1000"}
        try:
            self._begin(temp)
        except BaseException:
            self.close()
            raise

    def _begin(self, temp: str) -> None:
        self.start(
            "--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={temp}", "--num-cpus=0",
            f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
        )  # fmt: skip
        self.wait(lambda: self.get("/api/version").status == 200)
        self.start(
            f"--address=127.0.0.1:{self.port}", f"--temp-dir={temp}w", "--num-cpus=2",
            f"--dashboard-agent-listen-port={free_port()}", f"--runtime-env-agent-port={free_port()}",
        )  # fmt: skip
        self.wait(lambda: self.alive() == 2)

    def alive(self) -> int:
        """Return the number of nodes that have joined the cluster."""
        nodes = json.load(self.get("/nodes?view=summary"))["data"]["summary"]
        return sum((node.get("raylet") or {}).get("state") == "ALIVE" for node in nodes)

    def start(self, *arguments: str) -> None:
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        command = [self.python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]
        log = open(Path(self.environment["RAY_TMPDIR"]) / f"start{len(self.processes)}.log", "wb")  # noqa: SIM115
        self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    def get(self, path: str, token: str = TOKEN) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return urllib.request.urlopen(request, timeout=60)

    def wait(self, ready: Callable[[], bool], seconds: int = 180) -> None:
        """Wait until `ready` returns True; a failed request to the head counts as False."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert all(p.poll() is None for p in self.processes)
            with suppress(OSError, http.client.HTTPException, ValueError, LookupError):
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

    def stop(self, submission: str) -> None:
        """Stop a job at once, as `ray job stop` does after the seconds that it takes to start."""
        request = urllib.request.Request(
            f"{self.url}/api/jobs/{submission}/stop", method="POST", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        urllib.request.urlopen(request, timeout=60).close()

    def details(self, submission: str) -> dict[str, Any]:
        return json.load(self.get(f"/api/jobs/{submission}"))

    def descendants(self) -> list[psutil.Process]:
        return [child for p in self.processes for child in psutil.Process(p.pid).children(recursive=True)]

    def close(self) -> None:
        everyone = self.descendants()
        for process in (*self.processes, *everyone):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()
        psutil.wait_procs(everyone, timeout=20)


@contextmanager
def started(python: str = sys.executable) -> Iterator[Head]:
    temp = tempfile.mkdtemp(prefix="rj", dir="/tmp")
    head = Head(temp, python)
    try:
        yield head
    finally:
        head.close()
        for left in (temp, f"{temp}w"):
            shutil.rmtree(left, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started() as head:
        yield head


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make an interpreter that has every package of this one but ray_soup."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(installed))  # not their .pth files, such as that of an editable install
    python = str(folder / "bin" / "python")
    if subprocess.run([python, "-c", "import ray_soup"], cwd=folder, capture_output=True).returncode == 0:
        pytest.skip("ray_soup is installed among the other packages")
    return python


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


def submit(
    head: Head, folder: Path, name: str, *arguments: str, wait: bool = True, **environment: Any
) -> subprocess.CompletedProcess[str]:
    options = ["--submission-id", name, "--working-dir", str(folder), *([] if wait else ["--no-wait"])]
    options += ["--runtime-env-json", json.dumps(environment)] if environment else []
    return head.job("submit", *options, "--", head.python, "learn_soup.py", *arguments)


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
    head.stop("stops")
    head.wait(lambda: head.details("stops")["status"] in ("STOPPED", "SUCCEEDED", "FAILED"), 300)
    assert head.details("stops")["status"] == "STOPPED"
    done = submit(head, folder, "resumes", "recipe.yaml", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_array_equal(load_coefficients(tmp_path / "out" / "coefficients.safetensors").values, alone)


class Prometheus:
    """A Prometheus server that scrapes the nodes in Ray's service discovery file every two seconds."""

    def __init__(self, head: Head, folder: Path) -> None:
        found = Path(head.environment["RAY_TMPDIR"]) / "prom_metrics_service_discovery.json"
        config = {
            "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
            "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(found)], "refresh_interval": "1s"}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.url, self.started = f"http://127.0.0.1:{free_port()}", time.time()
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def largest(self, query: str) -> float | None:
        """Return the largest value of a query since the server was started; None if it returns no data."""
        asked = urllib.parse.urlencode({"query": query, "start": self.started, "end": time.time(), "step": 1})
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{asked}", timeout=60) as answer:
            series = json.load(answer)["data"]["result"]
        return max((float(value) for one in series for _, value in one["values"] if value != "NaN"), default=None)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")
def test_every_panel_of_the_dashboard_shows_a_run_that_lost_an_actor(head: Head, folder: Path, tmp_path: Path) -> None:
    prometheus = Prometheus(head, tmp_path)
    log, address = tmp_path / "log", f"127.0.0.1:{head.port}"
    environment = {**head.environment, "RAY_ADDRESS": address, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "default"}
    options = ["actors.replicas=2", "actors.wait_s=90", "learn.epochs=50", "--log-format=json"]
    options += ["directions.dtype=bfloat16"]  # whose store no other test builds: checkpoints are read
    command = ray_soup("learn", str(folder / "recipe.yaml"), str(tmp_path / "out"), *options)

    def actors() -> list[psutil.Process]:
        return [actor for process in head.processes for actor in children_called("RemoteShard", process.pid)]

    others = actors()  # of a run that another test has stopped
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=file)
    try:

        def about() -> dict[str, str] | None:
            assert process.poll() is None, log.read_text()
            drivers = [j for j in json.load(head.get("/api/jobs/")) if j["type"] == "DRIVER" and j["status"] == "RUNNING"]
            return next((j["metadata"] for j in drivers if j["metadata"].get("out") == str(tmp_path / "out")), None)

        def has_counted_steps() -> bool:
            run = about()
            return run is not None and (prometheus.largest(f'ray_soup_steps_total{{run="{run["ray_soup"]}"}}') or 0) > 0

        head.wait(has_counted_steps, 120)
        next(actor for actor in actors() if actor not in others).kill()
        run = about()
        assert run is not None
        assert run["method"] == "mehl+"
        assert process.wait(240) == 0, log.read_text()
        record = json.loads((tmp_path / "out" / "run.json").read_text())
        of_run = f'{{run="{run["ray_soup"]}"}}'
        head.wait(lambda: prometheus.largest(f"sum(ray_soup_steps_total{of_run})") == record["steps"], 120)
        dashboard = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
        shown = {}
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "20s").replace('{run=~"$run"}', of_run)
                shown[panel["title"], target["legendFormat"]] = prometheus.largest(query)
    finally:
        process.kill()
        process.wait()
        prometheus.process.kill()
        prometheus.process.wait()
    assert None not in shown.values(), shown
    assert all("time" in json.loads(line) for line in log.read_text().splitlines())
    assert shown["Runs", ""] == 1
    evaluated = [
        line["select_nll"] for line in record["curve"]
    ]  # the largest that was scraped is one of them, not always the first
    assert shown["NLL on select", "{{run}} {{method}}"] in [pytest.approx(nll) for nll in evaluated]
    assert shown["Actors", "{{run}}"] == 2
    assert all(shown["What happened to actors", what] >= 1 for what in ("lost", "re-created or added")), shown


def test_a_cluster_without_the_package_gets_it_with_the_job(
    bare: str, folder: Path, tmp_path: Path, alone: np.ndarray
) -> None:
    with started(bare) as head:
        out = tmp_path / "out"
        done = submit(head, folder, "brings", "recipe.yaml", str(out), py_modules=[str(ROOT / "ray_soup")])
        assert done.returncode == 0, done.stdout + done.stderr
        np.testing.assert_array_equal(load_coefficients(out / "coefficients.safetensors").values, alone)
