"""The recurring example: its script creates a RayJob with the date, through a real API over TLS, once a day."""

from __future__ import annotations

import importlib.util
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.conftest import ROOT
from tests.ray.manifests import CLUSTER, LABEL, MANIFESTS, PINS, faults, pods_of

spec = importlib.util.spec_from_file_location("create_rayjob", ROOT / "jobs" / "create_rayjob.py")
assert spec is not None
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


class Api(BaseHTTPRequestHandler):
    created: ClassVar[list[dict[str, Any]]] = []
    status = 201

    def do_POST(self) -> None:
        manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == f"/apis/ray.io/v1/namespaces/{manifest['metadata']['namespace']}/rayjobs"
        assert self.headers["Authorization"] == "Bearer of-the-account"
        names = [one["metadata"]["name"] for one in self.created]
        status = 409 if manifest["metadata"]["name"] in names else self.status
        if status == 201:
            self.created.append(manifest)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"{}" if status == 201 else b"not allowed")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pod's service account, and the API server that it belongs to."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", tmp_path / "key", "-out", tmp_path / "ca.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "token").write_text("of-the-account")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key")
    Api.created, Api.status = [], 201
    with HTTPServer(("127.0.0.1", 0), Api) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_port))
        yield tmp_path
        server.shutdown()


def test_one_rayjob_a_day_with_an_out_of_its_own(account: Path) -> None:
    file = str(CLUSTER / "rayjob-cpu.yaml")
    said = job.create_rayjob(file, "2026-11-27", account)
    assert said == "Created the RayJob ray-soup-cpu-2026-11-27, which writes s3://BUCKET/out/cpu/2026-11-27."
    assert job.create_rayjob(file, "2026-11-27", account) == "The RayJob ray-soup-cpu-2026-11-27 exists."
    job.create_rayjob(file, "2026-11-28", account)
    assert [made["metadata"]["name"] for made in Api.created] == ["ray-soup-cpu-2026-11-27", "ray-soup-cpu-2026-11-28"]
    for made in Api.created:
        assert list(faults(made, PINS["ray"])) == []
        (original,) = MANIFESTS["rayjob-cpu.yaml"]
        for pod in pods_of(made):
            assert pod.labels[LABEL] == "nightly", "it shares budgets with rayjob-cpu.yaml"
            pod.labels[LABEL] = "cpu"
        del made["metadata"]["name"], made["spec"]["entrypoint"]
        assert made["spec"] == {key: value for key, value in original["spec"].items() if key != "entrypoint"}


def test_a_refusal_is_an_exit_that_quotes_the_server(account: Path) -> None:
    Api.status = 403
    with pytest.raises(SystemExit, match=r"The RayJob ray-soup-cpu-2026-11-27 was not created: 403 not allowed"):
        job.create_rayjob(str(CLUSTER / "rayjob-cpu.yaml"), "2026-11-27", account)
