"""Signals to a running command: it saves, says so, and ends with 128 + the signal's number within a few seconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import ROOT, ray_soup, steps_saved, values
from tests.ray.events import wait_for
from tests.stopping import freeze, interruptible, running, stop
from tests.system.command import write_recipe

SCRIPT = """
import concurrent.futures, contextlib, sys, threading, time
from pathlib import Path
import click
from ray_soup import exits
from ray_soup.io.signals import last_words, under_handler, uninterrupted

out = Path(sys.argv[2])

def wait():
    print("ready", flush=True)
    time.sleep(60)

def threads():
    with concurrent.futures.ThreadPoolExecutor() as pool:  # waits for its threads at the end
        pool.submit(time.sleep, 60)
        wait()

def stubborn():
    while True:
        with contextlib.suppress(BaseException):
            wait()

def cleanup():
    try:
        wait()
    finally:
        time.sleep(60)

def other_error():
    try:
        wait()
    except BaseException:
        raise ValueError("the node has ended")

def native():
    import ctypes
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(1)  # holds the interpreter
    time.sleep(60)

def reset():
    import ctypes

    def work():  # as Ray does when it disconnects
        ctypes.CDLL(None).signal(15, None)
        time.sleep(0.3)
        print("ready", flush=True)
        time.sleep(0.3)

    under_handler(work)
    time.sleep(60)

def reset_before():
    import ctypes
    under_handler(lambda: ctypes.CDLL(None).signal(15, None))
    wait()

def delayed():
    with uninterrupted():
        print("ready", flush=True)
        for _ in range(20):
            time.sleep(0.05)
        (out / "whole").touch()
    time.sleep(60)

@click.group(cls=exits.Shell)
def shell():
    pass

@shell.command()
@click.argument("folder")
@exits.common_options
def work(folder, as_json):
    with last_words((out / "last").touch):
        exits.run_task(lambda progress: globals()["CASE"]())

shell()
"""


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Let child processes receive Ctrl-C, which a shell makes its background jobs ignore."""
    with interruptible():
        yield


def start(case: str, out: Path, prefix: str = "") -> subprocess.Popen[str]:
    command = [
        "sh",
        "-c",
        f'{prefix} exec "$0" -c "$1" work "$2" --json',
        sys.executable,
        SCRIPT.replace("CASE", case),
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", process.stderr.read() if process.stderr else line
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return process.returncode, out, err


IN_A_DESTRUCTOR = """
import os, signal, time
from ray_soup.errors import Stopped
from ray_soup.io.signals import catching_signals

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

with catching_signals():
    try:
        Last()
        print("continues", flush=True)
        time.sleep(20)
    except Stopped:
        print("stopped", flush=True)
        os._exit(0)
"""


def test_a_signal_where_python_drops_errors_is_not_lost() -> None:
    """As in a destructor, or in what is called when a process forks."""
    done = subprocess.run([sys.executable, "-c", IN_A_DESTRUCTOR], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("stopped\n")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminal closed"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_ends_a_command_with_its_code(number: signal.Signals, code: int, said: str, tmp_path: Path) -> None:
    process = start("wait", tmp_path)
    process.send_signal(number)
    found, out, err = ended(process)
    assert found == code
    assert err == f"ray-soup: {said}. Rerun the same command to resume.\n"
    assert json.loads(out) == {"error": f"{said}. Rerun the same command to resume.", "exit": code}


@pytest.mark.parametrize("case", ["cleanup", *(pytest.param(c, marks=pytest.mark.slow) for c in ("threads", "stubborn"))])
def test_a_command_that_does_not_stop_is_ended_after_its_last_words(case: str, tmp_path: Path) -> None:
    process = start(case, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 143
    assert err.endswith("ray-soup: terminated. Rerun the same command to resume.\n")
    assert (tmp_path / "last").exists()


@pytest.mark.parametrize("case", ["reset", "reset_before"])
def test_a_library_that_resets_the_handler_does_not_hide_a_signal(case: str, tmp_path: Path) -> None:
    process = start(case, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 143
    assert err == "ray-soup: terminated. Rerun the same command to resume.\n"


@pytest.mark.parametrize("case", ["other_error", "native"])
def test_what_fails_because_of_a_signal_is_not_an_error(case: str, tmp_path: Path) -> None:
    process = start(case, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 143
    assert err.endswith("terminated. Rerun the same command to resume.\n")
    assert not (tmp_path / "last").exists()


def test_a_signal_waits_for_the_end_of_a_step(tmp_path: Path) -> None:
    process = start("delayed", tmp_path)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert (tmp_path / "whole").exists()


def test_a_second_and_a_third_interrupt_end_a_command_at_once(tmp_path: Path) -> None:
    process = start("cleanup", tmp_path)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, _, err = ended(process)
    assert code == 130
    assert err.strip() == "ray-soup: interrupted. Rerun the same command to resume."
    assert (tmp_path / "last").exists()


def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path: Path) -> None:
    process = start("wait", tmp_path, "trap '' HUP;")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


@pytest.mark.slow
def test_a_stopped_run_saves_its_last_step_and_resumes_to_the_same_bits(zoo: Path, tmp_path: Path, cluster: None) -> None:
    """It is stopped while it waits for an actor that does not answer, and once more with Ctrl-C after it was resumed."""
    recipe = values(zoo, learn__epochs=12, learn__batch_size=8)
    command = ray_soup("learn", str(write_recipe(tmp_path, recipe)), str(tmp_path / "out"))
    for number in (signal.SIGTERM, signal.SIGINT):
        before = steps_saved(tmp_path / "out")
        with running(command, cwd=ROOT) as process:
            wait_for(lambda before=before: steps_saved(tmp_path / "out") > before, process)
            if number == signal.SIGTERM:
                freeze(process, "RemoteShard")
            stop(process, number)
        assert json.loads((tmp_path / "out" / "run.json").read_text())["exit"] == 128 + number
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    run(make_recipe(recipe), tmp_path / "alone")
    ours, theirs = (load_coefficients(tmp_path / o / "coefficients.safetensors").values for o in ("alone", "out"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 5, 7, 9])
def test_a_run_ends_with_143_at_any_moment(zoo: Path, tmp_path: Path, seconds: int) -> None:
    """While libraries are imported, while Ray starts, while the actors start, while they compute."""
    recipe = write_recipe(tmp_path, values(zoo, learn__epochs=4000))
    process = subprocess.Popen(
        ray_soup("learn", str(recipe), str(tmp_path / "out")),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 143
    assert err.endswith("terminated. Rerun the same command to resume.\n")
    if (tmp_path / "out" / "run.json").exists():
        assert json.loads((tmp_path / "out" / "run.json").read_text())["exit"] == 143


def test_the_grace_is_shorter_than_five_seconds() -> None:
    from ray_soup.io import signals

    assert signals.RECORD_S < 3 <= signals.GRACE_S < 4.5
