from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import fetch as fetching
from ray_soup.io.fetch import fetch, read_list

FILES = {f"m_{k}.pt": np.random.default_rng(k).bytes(700_000 + k) for k in range(5)}


class Server(ThreadingHTTPServer):
    """Serves FILES, by range if `ranges`; cuts a file's first connections after `cuts` bytes, or answers with `failures`."""

    ranges = True
    lengths = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts: dict[str, list[int]] = {}
        self.failures: dict[str, list[int]] = {}
        self.asked: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        name, asked = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.asked.append((name, asked))
        if self.server.failures.get(name):
            self.send_error(self.server.failures[name].pop(0))
            return
        if name not in FILES:
            self.send_error(404)
            return
        data, first = FILES[name], 0
        if asked and self.server.ranges:
            first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if self.server.lengths:
            self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        cut = self.server.cuts.get(name)
        self.wfile.write(data[first : first + cut.pop(0)] if cut else data[first:])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def listed(folder: Path, *lines: str) -> str:
    (folder / "list.txt").write_text("\n".join(lines))
    return str(folder / "list.txt")


def assert_whole(out: Path, *names: str) -> None:
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {name: FILES[name] for name in names}


def digest(name: str) -> str:
    return hashlib.sha256(FILES[name]).hexdigest()


def test_all_files_of_a_list_are_fetched_once(server: Server, tmp_path: Path) -> None:
    lines = [f"{server.url(n)} {len(d)} {digest(n).upper()}  # the full line" for n, d in FILES.items()]
    spec, seen = listed(tmp_path, "# the zoo", "", *lines), []
    out = tmp_path / "zoo"
    assert fetch(spec, out, lambda *news: seen.append(news)) == [out / name for name in FILES]
    assert_whole(out, *FILES)
    size = sum(map(len, FILES.values()))
    assert seen[-1] == ("fetching", size, size)
    asked = len(server.asked)
    fetch(spec, out)
    assert len(server.asked) == asked


def test_a_dropped_connection_is_resumed_where_it_ended(server: Server, tmp_path: Path) -> None:
    """The size is the server's. There are more cuts than attempts, but each attempt received something."""
    server.cuts["m_0.pt"] = [100_000] * 5
    fetch(listed(tmp_path, server.url("m_0.pt")), tmp_path / "zoo")
    assert_whole(tmp_path / "zoo", "m_0.pt")
    assert [asked for _, asked in server.asked] == [None, *(f"bytes={k}00000-" for k in range(1, 6))]


def test_a_stopped_fetch_is_resumed(server: Server, tmp_path: Path) -> None:
    spec, out = listed(tmp_path, f"{server.url('m_0.pt')} {len(FILES['m_0.pt'])} {digest('m_0.pt')}"), tmp_path / "zoo"
    server.cuts["m_0.pt"] = [300_000]

    class Stop(Exception): ...

    def progress(what: str, done: int, total: int) -> None:
        raise Stop

    server.failures["m_0.pt"] = []
    out.mkdir()
    (out / "m_0.pt.part").write_bytes(FILES["m_0.pt"][:123_456])
    fetch(spec, out)
    assert server.asked[0] == ("m_0.pt", "bytes=123456-")
    assert_whole(out, "m_0.pt")
    (out / "m_0.pt").rename(out / "m_0.pt.part")  # complete when the run was stopped
    fetch(spec, out)
    assert_whole(out, "m_0.pt")
    with pytest.raises(Stop):
        fetch(listed(tmp_path, *map(server.url, FILES)), out, progress)
    assert not any(f.name.endswith(".lock") for f in out.iterdir())
    fetch(listed(tmp_path, *map(server.url, FILES)), out)
    assert_whole(out, *FILES)


def test_a_partial_download_that_is_complete_or_too_long_is_handled(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    out.mkdir()
    for more in (b"", b"more"):
        (out / "m_1.pt.part").write_bytes(FILES["m_1.pt"] + more)
        fetch(listed(tmp_path, server.url("m_1.pt")), out)
        assert_whole(out, "m_1.pt")
        (out / "m_1.pt").unlink()


def test_servers_without_ranges_or_lengths_work(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts["m_0.pt"] = [100_000]
    fetch(listed(tmp_path, server.url("m_0.pt")), tmp_path / "zoo")
    server.lengths = False
    fetch(listed(tmp_path, f"{server.url('m_1.pt')} {len(FILES['m_1.pt'])}"), tmp_path / "zoo")
    assert_whole(tmp_path / "zoo", "m_0.pt", "m_1.pt")


def test_temporary_failures_are_retried(server: Server, tmp_path: Path) -> None:
    server.failures["m_0.pt"] = [503, 429]
    fetch(listed(tmp_path, server.url("m_0.pt")), tmp_path / "zoo")
    assert_whole(tmp_path / "zoo", "m_0.pt")
    server.failures["m_1.pt"] = [500] * 9
    with pytest.raises(SoupError, match=r"m_1\.pt could not be fetched: 3 attempts failed .*500 Internal Server Error"):
        fetch(listed(tmp_path, server.url("m_1.pt")), tmp_path / "zoo")
    assert len(server.asked) == 3 + 3


def test_wrong_files_are_removed_and_named_and_the_others_are_fetched(server: Server, tmp_path: Path) -> None:
    wrong, out = "0" * 64, tmp_path / "zoo"
    spec = listed(
        tmp_path, server.url("m_0.pt"), f"{server.url('m_1.pt')} {wrong}", f"{server.url('m_2.pt')} 5", server.url("no.pt")
    )
    with pytest.raises(SoupError) as error:
        fetch(spec, out)
    said = str(error.value)
    sha = digest("m_1.pt")
    assert f"m_1.pt (from {server.url('m_1.pt')}) has the SHA-256 {sha}; expected {wrong}. The download was removed" in said
    assert f"{server.url('m_2.pt')} has 700,002 bytes; expected 5" in said
    assert f"{server.url('no.pt')}: 404 Not Found. Check the address" in said
    assert f"1 of 4 files are in {out}" in said
    assert error.value.exit_code == 1
    assert_whole(out, "m_0.pt")
    assert len(server.asked) == 4


def test_a_file_with_other_content_is_left_alone(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    out.mkdir()
    (out / "m_0.pt").write_text("mine")
    with pytest.raises(SoupError, match=r"has 4 bytes; expected 700,000\. Remove it"):
        fetch(listed(tmp_path, f"{server.url('m_0.pt')} 700000"), out)
    assert (out / "m_0.pt").read_text() == "mine"


def test_one_fetch_at_a_time(server: Server, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".fetch.lock"), pytest.raises(RecipeError, match="Another fetch is using"):
        fetch(listed(tmp_path, server.url("m_0.pt")), tmp_path)


def test_lists_are_read_and_wrong_entries_are_named(tmp_path: Path) -> None:
    soups = read_list("model-soups")
    assert [item.name for item in soups] == [f"model_{i}.pt" for i in range(72)]
    assert soups[7].url == "https://github.com/mlfoundations/model-soups/releases/download/v0.0.2/model_7.pt"
    (tmp_path / "l.yaml").write_text(
        f"- https://h/a%20b.pt?download=1\n- {{url: 'https://h/c.pt', size: 7, sha256: {'a' * 64}}}\n"
    )
    first, second = read_list(str(tmp_path / "l.yaml"))
    assert (first.name, first.size, first.sha256) == ("a b.pt", None, None)
    assert (second.name, second.size, second.sha256) == ("c.pt", 7, "a" * 64)
    for line in ("file:///etc/passwd", "https://h/", "https://h/a.pt abc", "https://h/a.pt 5 6", "https://h/%2E%2E"):
        with pytest.raises(RecipeError, match=r"has the entry .*expected lines `URL \[size in bytes\] \[SHA-256\]`"):
            read_list(listed(tmp_path, line))
    with pytest.raises(RecipeError, match=r"two files called a\.pt"):
        read_list(listed(tmp_path, "https://h/a.pt", "https://i/a.pt"))
    with pytest.raises(RecipeError, match="has no entries"):
        read_list(listed(tmp_path, "# nothing"))
    with pytest.raises(RecipeError, match="built-in list: model-soups"):
        read_list(str(tmp_path / "none.txt"))


ENTRIES = [
    "https://h/a.pt 0", "https://h/a.pt -5", "https://h/a.pt ²", "https://h:x/a.pt", "https://h:99999999/a.pt",
    "http://[::1/a.pt", "https://user:password@h/a.pt", "https://h/é.pt", "https://h/a%00b", "https://h/a%1b[31m",
    "https://h/.fetch.lock", "https://h/..", "https:///a.pt", "HTTPS://h/a.pt", f"https://h/{'a' * 300}", "s3://b/a.pt",
]  # fmt: skip
YAML_ENTRIES = [
    "- ''", "- 5", "- null", "- [https://h/a]", "- {url: https://h/a, size: true}", "- {url: https://h/a, size: 5.0}",
    "- {url: https://h/a, size: '5'}", "- {url: https://h/a, size: 1e400}", "- {url: [https://h/a]}", "- {size: 5}",
    "- {url: https://h/a, md5: abc}", "- {url: https://h/a, sha256: abc}",
]  # fmt: skip


@pytest.mark.parametrize("entry", [*ENTRIES, *YAML_ENTRIES], ids=ascii)
def test_a_hostile_entry_is_refused(tmp_path: Path, entry: str) -> None:
    file = tmp_path / ("l.yaml" if entry in YAML_ENTRIES else "l.txt")
    file.write_text(entry)
    with pytest.raises(RecipeError, match=rf"The list {file} has the entry .*expected lines") as error:
        read_list(str(file))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("&a [*a]", "the alias *a has no finished anchor"),
        ("[" * 100_000, "nest"),
        ("- &a {url: x, url: y}", "the key 'url' was already in line 1"),
        ("- !!python/name:os.system x", "the tag !!python/name:os.system is not supported"),
        ("- https://h/a\n---\n- https://h/b", "a second document begins"),
        ("a: b", "has no entries"),
        ("- https://h/a\n" * 10_001, "has 10,001 entries; expected at most 10,000"),
        ("# comment\n" * 200_000, "is larger than 1,000,000 bytes"),
        ("- https://h/a\x1b", "contains the control character"),
        ("- https://h/a\n- https://h/a.part", "has the file a.part, the name of a partial download"),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_hostile_list_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "l.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(said)) as error:
        read_list(str(file))
    assert f"The list {file}" in str(error.value)


def test_a_digest_of_decimal_digits_keeps_its_zeros(tmp_path: Path) -> None:
    (tmp_path / "l.yaml").write_text(
        f"- {{url: https://h/a, size: 0x10, sha256: 00{'1' * 62}}}\n- https://h/b 5 {'A' * 64}\n"
    )
    first, second = read_list(str(tmp_path / "l.yaml"))
    assert (first.size, first.sha256) == (16, "00" + "1" * 62)
    assert (second.size, second.sha256) == (5, "a" * 64)


def test_what_is_no_file_is_neither_read_nor_written(server: Server, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "pipe", "is a named pipe"),
        (tmp_path, "is a folder"),
        (Path("/dev/zero"), "is a device"),
    ):
        with pytest.raises(RecipeError, match=said):
            read_list(str(path))
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious").write_text("precious")
    os.mkfifo(out / "m_0.pt")
    (out / "m_1.pt.part").symlink_to(tmp_path / "precious")
    (out / "m_2.pt").mkdir()
    with pytest.raises(SoupError, match=r"m_0\.pt is not a regular file.*\n.*m_1\.pt\.part is not.*\n.*m_2\.pt is not"):
        fetch(listed(tmp_path, *(server.url(f"m_{k}.pt") for k in range(3))), out)
    assert (tmp_path / "precious").read_text() == "precious"
    assert server.asked == []


def test_a_server_that_sends_more_than_expected_is_cut_off(server: Server, tmp_path: Path) -> None:
    server.lengths = False
    with pytest.raises(SoupError, match=r"m_0\.pt sends more than the 1,000 bytes expected"):
        fetch(listed(tmp_path, f"{server.url('m_0.pt')} 1000"), tmp_path / "out")
