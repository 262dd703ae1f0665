"""Every exception becomes one sentence with the place and a remedy, and an exit code."""

from __future__ import annotations

import builtins
import concurrent.futures.process
import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import pyarrow as pa
import pydantic
import pytest
import ray
import torch
import yaml
from filelock import Timeout
from safetensors import SafetensorError

from ray_soup import exits
from ray_soup.errors import IngredientError, OutputClosed, RecipeError, SoupError, Stopped, explain, first_line, place_of
from ray_soup.soups.report import console
from ray_soup.soups.report.json_log import json_log
from tests.conftest import ROOT

# Older versions of Ray have no such class; `explain` knows it by its name.
AuthenticationError = getattr(
    ray.exceptions, "AuthenticationError", type("AuthenticationError", (RuntimeError,), {"__module__": "ray"})
)


class Strict(pydantic.BaseModel):
    lr: int


def raised(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def deep() -> object:
    return deep()


ERRORS: dict[str, tuple[BaseException, int, str]] = {
    "recipe": (RecipeError("a.yaml: no"), 2, "a.yaml: no"),
    "ingredient": (IngredientError("a.pt: no"), 3, "a.pt: no"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted. Rerun the same command to resume."),
    "exit": (SystemExit(0), 1, "called sys.exit(0)"),
    "file": (raised(lambda: Path("/nothing/a.npz").read_bytes()), 1, "/nothing/a.npz: No such file or directory. Check"),
    "rename": (raised(lambda: os.rename("/nothing/a", "/nothing/b")), 1, "/nothing/a -> /nothing/b: No such file"),
    "folder": (raised(lambda: Path("/tmp").read_bytes()), 1, "/tmp: Is a directory."),
    "memory": (MemoryError(), 1, "too little memory"),
    "memory of a library": (ImportError("libtorch.so: failed to map segment from shared object"), 1, "see ulimit -v"),
    "gpu": (torch.OutOfMemoryError("CUDA out of memory"), 1, "The GPU has too little memory: CUDA out of memory. Use"),
    "recursion": (raised(deep), 2, "nested too deeply"),
    "deep json": (raised(lambda: json.loads("[" * 100_000)), 2, "nested too deeply"),
    "json": (raised(lambda: json.loads("{")), 1, "A JSON file is damaged: Expecting property name"),
    "yaml": (raised(lambda: yaml.safe_load("a: [")), 2, "The YAML is not valid: while parsing"),
    "unicode": (raised(lambda: b"\xff".decode()), 2, "not UTF-8: 'utf-8' codec can't decode byte 0xff"),
    "surrogate": (raised(lambda: "\udc80".encode()), 2, "not UTF-8"),
    "pydantic": (raised(lambda: Strict(lr="x")), 2, "A setting is not valid: 1 validation error for Strict"),  # type: ignore[arg-type]
    "arrow": (pa.ArrowInvalid("Could not open Parquet input source"), 2, "Check the files of `data:`"),
    "safetensors": (SafetensorError("Error while deserializing header"), 3, "A safetensors file is damaged"),
    "pickle": (pickle.UnpicklingError("invalid load key"), 3, "holds more than tensors: invalid load key. Copy"),
    "zip": (zipfile.BadZipFile("File is not a zip file"), 3, "A file is damaged: File is not a zip file. Copy"),
    "lock": (Timeout("/x/lock"), 1, "Another process holds a lock"),
    "pool": (concurrent.futures.process.BrokenProcessPool("ended abruptly"), 1, "A helper process ended unexpectedly"),
    "extra": (ModuleNotFoundError("No module named 'timm'", name="timm.models"), 2, "Run pip install 'ray_soup[timm]'."),
    "package": (raised(lambda: __import__("no_such_package")), 2, "Run pip install no_such_package."),
    "ray": (ray.exceptions.RaySystemError("raylet gone"), 1, "The Ray cluster failed: System error: raylet gone. Check"),
    "token": (AuthenticationError("bad token"), 2, "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
    "ray memory": (ray.exceptions.OutOfMemoryError("node"), 1, "ran out of memory"),
    "unknown": (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero. Rerun with --traceback"),
    "no text": (ValueError(), 1, "ValueError: ValueError. Rerun with --traceback"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_exception_becomes_a_sentence_and_an_exit_code(name: str) -> None:
    error, code, said = ERRORS[name]
    sentence, found = explain(error)
    assert said in sentence
    assert found == code
    assert "\n" not in sentence
    assert sentence.endswith(".") or isinstance(error, SoupError)


@pytest.mark.parametrize("name", sorted(n for n in dir(errno) if n.startswith("E")))
def test_every_error_of_the_system_names_the_file_and_a_remedy(name: str) -> None:
    error = OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/data/a b.pt")
    sentence, code = explain(error)
    assert sentence.startswith(f"/data/a b.pt: {error.strerror}. ")
    assert sentence.count(". ") >= 1
    assert code == (130 if name == "EINTR" and isinstance(error, KeyboardInterrupt) else 1)


KINDS = sorted(
    (e for e in vars(builtins).values() if isinstance(e, type) and issubclass(e, BaseException)), key=lambda e: e.__name__
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_built_in_exception_is_explained(kind: type[BaseException]) -> None:
    if issubclass(kind, UnicodeDecodeError):
        error: BaseException = kind("utf-8", b"x", 0, 1, "no")
    elif issubclass(kind, UnicodeEncodeError):
        error = kind("utf-8", "x", 0, 1, "no")
    elif issubclass(kind, UnicodeTranslateError):
        error = kind("x", 0, 1, "no")
    elif kind.__name__.endswith("ExceptionGroup"):
        error = kind("several", [ValueError("no")])
    else:
        error = kind("no")
    sentence, code = explain(error)
    assert len(sentence.split()) > 2
    assert code != 0


def test_an_exception_whose_text_fails_is_explained() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert "Odd: Odd." in explain(Odd())[0]
    assert len(first_line(ValueError("x" * 10_000))) == 500


def test_the_place_is_the_innermost_one_of_this_package() -> None:
    error = raised(lambda: exits.common_options(None))  # type: ignore[type-var]
    assert place_of(error).startswith("ray_soup.exits:")
    assert place_of(ValueError()) == "an unknown place"


def test_what_fails_after_a_signal_is_a_consequence_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopped, "signal", signal.SIGTERM)
    for error in (Stopped(), KeyboardInterrupt(), RuntimeError("the node has ended"), SoupError("lost"), SystemExit(15)):
        assert explain(error) == ("terminated. Rerun the same command to resume.", 143)
    monkeypatch.setattr(Stopped, "signal", signal.SIGHUP)
    assert explain(Stopped())[1] == 129


def test_a_malformed_log_call_of_a_library_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with json_log():
        logging.getLogger().handlers[-1].handle(logging.makeLogRecord({"msg": "of one %s", "args": ("and", "another")}))
    said = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert "TypeError: not all arguments converted during string formatting" in said


HANGS = """
import os, signal, time
from ray_soup.io.signals import catching_signals
from ray_soup.soups.report.console import as_said, log_as

log_as("{}")
with catching_signals(as_said):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    finally:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_last_sentence_of_a_process_that_is_ended_has_the_format_of_the_log(log_format: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(log_format)], capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    sentence = "ray-soup: interrupted. Rerun the same command to resume."
    assert done.returncode == 130
    if log_format == "json":
        assert json.loads(done.stderr)["message"] == sentence
    else:
        assert done.stderr == f"\n{sentence}\n"


def test_an_error_of_an_actor_is_explained_by_its_cause() -> None:
    remote = ray.exceptions.RayTaskError("f", "Traceback ...", OSError(28, "No space left on device", "/x/a"), "p", 1, "ip")
    assert explain(remote.as_instanceof_cause())[0].startswith("/x/a: No space left on device.")


@pytest.mark.parametrize("option", [["--log-format", "json"], ["--log-format=json"]])
def test_a_command_that_fails_says_so_in_json(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    @click.group(cls=exits.Shell)
    def shell() -> None: ...

    @shell.command()
    @exits.common_options
    def read(as_json: bool) -> None:
        exits.run_task(lambda progress: noisy())

    def noisy() -> None:
        warnings.warn("of Python", stacklevel=1)
        logging.getLogger("some.library").warning("of a %s", "library")
        logging.getLogger("some.library").info("unseen")
        try:
            raise KeyError("lost")
        except KeyError:
            logging.getLogger("some.library").exception("It failed")
        print("half a ", end="", file=sys.stderr)
        print("line\rand one", file=sys.stderr)
        Path("/nothing").read_text()

    with pytest.raises(SystemExit):
        shell.main(["read", *option])
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    found = [line for line in lines if "phase" not in line]
    assert [line["phase"] for line in lines if "phase" in line] == ["starting", "starting"]
    assert (found[0]["level"], found[0]["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: of Python" in found[0]["message"]
    assert (found[1]["logger"], found[1]["message"]) == ("some.library", "of a library")
    said = [line["message"] for line in found]
    failure = next(line["message"] for line in found if line.get("level") == "error")
    assert failure.startswith("It failed\nTraceback (most recent call last):\n")
    assert failure.endswith("KeyError: 'lost'")
    assert said[-3:-1] == ["half a line", "and one"]
    assert lines[-1]["message"].startswith("ray-soup: /nothing: No such file")
    with pytest.raises(SystemExit):
        shell.main(["read"])  # the next command in this process logs text again
    assert capsys.readouterr().err.splitlines()[-1].startswith("ray-soup: /nothing: No such file")


@pytest.mark.parametrize("end", ["raise", "usage", "group"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_command_that_fails_prints_a_sentence_and_json(
    end: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.group(cls=exits.Shell)
    def shell() -> None: ...

    @shell.command()
    @click.argument("file")
    @exits.common_options
    def read(file: str, as_json: bool) -> None:
        exits.run_task(lambda progress: Path(file).read_text())

    arguments = {"raise": ["read", "/nothing/s3://me:pass@word@b"], "usage": ["read"], "group": ["reed"]}[end]
    with pytest.raises(SystemExit) as ended:
        shell.main([*arguments, *(["--json"] if as_json else [])])
    shown = capsys.readouterr()
    assert ended.value.code == (1 if end == "raise" else 2)
    assert "Traceback" not in shown.err
    assert "word" not in shown.err + shown.out
    said = {"raise": "ray-soup: /nothing/s3:/[redacted]@b: No such file", "usage": "Missing argument", "group": "'reed'"}[
        end
    ]
    assert said in shown.err
    if as_json:
        found = json.loads(shown.out.splitlines()[-1])
        assert found["exit"] == ended.value.code
        assert found["error"].split("'")[0] in shown.err
    else:
        assert shown.out == ""


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_traceback_is_shown_on_request(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.group(cls=exits.Shell)
    def shell() -> None: ...

    @shell.command()
    @exits.common_options
    def fail(as_json: bool) -> None:
        raise ZeroDivisionError("s3://me:word@b")

    if way == "variable":
        monkeypatch.setenv("RAY_SOUP_TRACEBACK", "1")
    with pytest.raises(SystemExit) as ended:
        shell.main(["fail", *(["--traceback"] if way == "option" else [])])
    shown = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback (most recent call last)" in shown
    assert "in fail" in shown
    assert "word" not in shown


def test_exit_codes_of_click_pass() -> None:
    @click.group(cls=exits.Shell)
    def shell() -> None: ...

    @shell.command()
    def four() -> None:
        click.get_current_context().exit(4)

    @shell.command()
    def zero() -> None:
        raise SystemExit(0)

    for arguments, code in (["four"], 4), (["zero"], 1), (["--help"], 0), (["four", "--help"], 0):
        with pytest.raises(SystemExit) as ended:
            shell.main(arguments)
        assert ended.value.code == code


def test_a_closed_output_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(console.click, "echo", closed)
    monkeypatch.setattr(console, "_redirect", lambda stream: None)
    with pytest.raises(OutputClosed) as broken:
        console.echo("x")
    assert broken.value.exit_code == 141
    console.say("x")
