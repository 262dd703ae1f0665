"""The environment: every variable and folder that is wrong is named, with what was found and expected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_soup.errors import RecipeError
from ray_soup.io import cache, environment
from ray_soup.io.environment import CACHE, CACHE_GB, DEADLINE, TRACEBACK, cache_bytes, check_environment, deadline_s
from tests.conftest import ROOT


@pytest.mark.parametrize("name", [DEADLINE, CACHE_GB])
@pytest.mark.parametrize("value", ["abc", "-1", "0", "nan", "inf", "1e400", "1,5", "10 s", "--", "x" * 10_000])
def test_a_wrong_number_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        RecipeError, match=f"The environment variable {name} is '.*'; expected a positive number of"
    ) as found:
        check_environment()
    assert len(str(found.value)) < 300


def test_numbers_are_read_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (deadline_s(), cache_bytes()) == (600, None)
    monkeypatch.setenv(DEADLINE, "2.5")
    monkeypatch.setenv(CACHE_GB, "1e-3")
    assert (deadline_s(), cache_bytes()) == (2.5, 1e6)
    monkeypatch.setenv(DEADLINE, "")
    assert deadline_s() == 600
    monkeypatch.setenv(TRACEBACK, "yes")
    with pytest.raises(RecipeError, match=f"{TRACEBACK} is 'yes'; expected 1 or 0"):
        check_environment()


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/x", "a link to nothing below /proc", "a\0b", "x" * 5000])
def test_a_cache_that_cannot_be_used_is_named(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "link").symlink_to("/proc/nothing")
    folder = {"a file": file, "below a file": file / "x", "a link to nothing below /proc": tmp_path / "link"}.get(
        place, place
    )
    with pytest.raises(
        RecipeError, match=r"(?s)The cache folder .* cannot be used: .*Set the environment variable RAY_SOUP_CACHE"
    ):
        environment.check_cache(Path(folder))


def test_without_a_home_the_cache_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv(CACHE, "/x")
    assert cache.cache_folder() == Path("/x")
    monkeypatch.delenv(CACHE)
    with pytest.raises(RecipeError, match="no home folder, and RAY_SOUP_CACHE is not set"):
        cache.cache_folder()


SCRIPT = """
import click
from ray_soup import exits
from ray_soup.soups.report.terminal import echo, print_table

@click.group(cls=exits.Shell)
def shell():
    pass

@shell.command()
@exits.common_options
def show(as_json):
    def task(progress):
        progress("reading \\x1b[31m\\udc80[red]", 1, 2)
        return "\\xe9 \\u6f22 \\udc80 \\x1b[31m\\u202e"
    text = exits.run_task(task)
    echo(text)
    print_table(["a", "b"], [[text, "[red]1"]])

shell()
"""


def run(redirect: str = "", **changes: str | None) -> subprocess.CompletedProcess[bytes]:
    environ = {k: v for k, v in {**os.environ, **changes}.items() if v is not None}
    command = ["sh", "-c", f'exec "$0" -c "$1" show {redirect}', sys.executable, SCRIPT]
    return subprocess.run(command, env=environ, capture_output=True, timeout=60, cwd=ROOT)


@pytest.mark.parametrize(
    "changes",
    [
        {"PYTHONIOENCODING": "latin-1", "COLUMNS": "abc", "TERM": "dumb", "NO_COLOR": "1", "LINES": "-1"},
        {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "TERM": None, "COLUMNS": "0"},
        {"FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"},
    ],
    ids=str,
)
def test_every_terminal_shows_every_name(changes: dict[str, str | None]) -> None:
    done = run(**changes)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"\\x1b[31m\\u202e" in done.stdout
    assert b"[red]1" in done.stdout
    assert b"\x1b[31m" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">/dev/full", 1, b"The standard output cannot be written: No space left on device"),
        ("2>/dev/full", 0, None),
        ("<&- >&- 2>&-", 0, None),
        pytest.param(">&-", 0, b"", marks=pytest.mark.slow),
        pytest.param("2>&-", 0, None, marks=pytest.mark.slow),
        pytest.param("<&-", 0, b"", marks=pytest.mark.slow),
        pytest.param(">/dev/full 2>/dev/full", 1, None, marks=pytest.mark.slow),
    ],
)
def test_a_closed_or_full_output_ends_without_a_traceback(redirect: str, code: int, said: bytes | None) -> None:
    done = run(redirect)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if said is not None:
        assert said in done.stderr


def test_a_reader_that_ends_early_is_no_error_to_talk_about() -> None:
    code = SCRIPT.replace("    echo(text)\n", "    for _ in range(100_000):\n        echo(text)\n")
    with subprocess.Popen(
        [sys.executable, "-c", code, "show", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
