"""`ray-soup fetch`: what it prints, and how it ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.system.command import call

SIZES = {"m_0.pt": 700_000, "m_1.pt": 700_001}


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve a folder with the files of SIZES; the value is its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    for name, nbytes in SIZES.items():
        (tmp_path / "served" / name).write_bytes(bytes(nbytes))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(tmp_path / "served"))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_command_lists_the_files_and_ends_with_the_exit_code(address: str, tmp_path: Path) -> None:
    spec, out = tmp_path / "list.txt", tmp_path / "zoo"
    spec.write_text("".join(f"{address}/{name}\n" for name in SIZES))
    result = call("fetch", spec, out, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "out": str(out),
        "files": [{"file": name, "bytes": nbytes} for name, nbytes in SIZES.items()],
    }
    plain = call("fetch", spec, out)
    assert (plain.exit_code, f"All 2 files of the list are in {out}, 1,400,001 bytes." in plain.stdout) == (0, True)
    spec.write_text(f"{address}/x.pt")
    missing = call("fetch", spec, out)
    assert (missing.exit_code, f"{address}/x.pt: 404 File not found." in missing.stderr) == (1, True)
    assert call("fetch", "nowhere", out).exit_code == 2
