"""Inject twenty faults into one learning run: how much time each costs, and whether the coefficients stay bit-identical."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import yaml

FAULTS = ("actor killed", "actor stopped", "raylet killed", "driver killed")
EACH = 5  # of every kind
SEED = 1
EPOCHS = 600  # a run continues for up to 15 s after its raylet is killed, and must not finish in that time
STEPS = 56  # per epoch
PATIENCE_S = 20  # until a silent actor counts as lost; an actor that starts is silent while it imports
GIVE_UP_S = 180  # per fault


class Run:
    """A `ray-soup learn` command, restarted whenever it ends before its soup is complete."""

    def __init__(self, folder: Path, name: str):
        self.out, self.starts, self.said = folder / name, 0, ""
        self._log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "ray_soup.cli", "learn", str(folder / "recipe.yaml"), str(self.out)]
        self._environment = {
            **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            "RAY_SOUP_CACHE": str(folder / "cache"),
            "RAY_SOUP_DEADLINE_S": str(PATIENCE_S),
            "RAY_TMPDIR": str(folder),
        }
        self._seen: set[psutil.Process] = set()
        self.start()

    def start(self) -> None:
        """Start the command."""
        self.starts += 1
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def keep_going(self) -> bool:
        """Restart the command if it has failed; return False once it is done.

        Raises RuntimeError if it failed without an error message of ray-soup.
        """
        code = self.process.poll()
        if code == 0:
            return False
        if code is not None:
            if code != -signal.SIGKILL:
                self.said = self.log().strip().rpartition("\n")[2]
                if code != 1 or not self.said.startswith("ray-soup: "):
                    raise RuntimeError(f"exit code {code}: {self.log()}")
            self.start()
        return True

    def log(self) -> str:
        """Return what the command has printed since it was last started."""
        return self._log.read_text()

    def saved(self) -> tuple[int, float]:
        """Return the steps in the last saved state, and when it was saved."""
        from ray_soup.soups.state import load_state

        file = self.out / "state" / "learn.pt"
        try:
            return load_state(file).steps, file.stat().st_mtime
        except FileNotFoundError:
            return 0, 0.0

    def family(self, what: str) -> list[psutil.Process]:
        """Return its running child processes whose command line contains `what`, sorted by process id."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self._seen |= set(children)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    if what in " ".join(child.cmdline()) and child.status() != psutil.STATUS_STOPPED:
                        found.append(child)
        return sorted(found, key=lambda p: p.pid)

    def inject(self, fault: str, random: np.random.Generator) -> None:
        """Inject one fault into the running command."""
        self.family("")
        if fault == "driver killed":
            self.process.kill()
            self.process.wait()
            return
        candidates = self.family("RemoteShard")
        if fault == "raylet killed":
            candidates = [p for p in self.family("raylet") if p.name() == "raylet"]
        victim = candidates[int(random.integers(len(candidates)))]
        victim.send_signal(signal.SIGSTOP if fault == "actor stopped" else signal.SIGKILL)

    def clean(self) -> None:
        """Kill what a killed driver or raylet left behind."""
        self.family("")
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in self._seen:
            with contextlib.suppress(psutil.Error):  # psutil notices if the process id has been reused
                process.kill()


def disturb(run: Run, usual_s: float) -> dict[str, float]:
    """Inject the faults one after another, each some epochs after the run has recovered from the one before.

    Returns the seconds that each fault cost: the time from the last state saved before it to the first one saved after it,
    minus the usual time for the same number of epochs.

    Args:
        run: the command, already started.
        usual_s: seconds of an undisturbed epoch.
    """
    random = np.random.default_rng(SEED)
    faults = [str(fault) for fault in random.permutation(np.repeat(FAULTS, EACH))]
    lost: dict[str, float] = {}
    over, starts = 0, 1
    for number, fault in enumerate(faults):
        due = over + STEPS * random.integers(1, 4)
        wait(run, lambda: run.saved()[0] >= due and run.family("RemoteShard"), f"{number + 1:02} {fault}, before")  # noqa: B023
        time.sleep(usual_s * random.random())
        before, then = run.saved()
        run.said, starts = "", run.starts
        run.inject(fault, random)
        # After its raylet is killed a run may continue for seconds, until its actors or its driver notice.
        restarts = fault in ("driver killed", "raylet killed")
        wait(run, lambda: not restarts or run.starts > starts, f"{number + 1:02} {fault}, noticed")  # noqa: B023
        reached = run.saved()[0]
        # An epoch may have been saved between `saved` and `inject`.
        wait(run, lambda: run.saved()[0] > max(before + STEPS, reached), f"{number + 1:02} {fault}, after")  # noqa: B023
        over, now = run.saved()
        lost[f"{number + 1:02} {fault}, step {before}: lost (s)"] = now - then - (over - before) / STEPS * usual_s
        print(
            f"{number + 1:02} {fault}: {now - then:.1f} s, {over - before} steps, {run.starts} starts; {run.said}",
            file=sys.stderr,
        )
    return lost


def wait(run: Run, what: Callable[[], object], when: str) -> None:
    """Wait until `what` is true, and restart the run if it fails. Raises RuntimeError if it ends or makes no progress."""
    started = time.monotonic()
    while not what():
        if not run.keep_going() or time.monotonic() - started > GIVE_UP_S:
            raise RuntimeError(f"Fault {when}: the run has ended or makes no progress. {run.log()}")
        time.sleep(0.02)


def write_inputs(folder: Path) -> None:
    """Write ingredients, data and recipe."""
    from tests import tiny

    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", 8)
    recipe = {
        "method": "mehl+",
        "ingredients": str(folder / "zoo" / "*.safetensors"),
        "model": tiny.SPEC,
        "data": {"fit": str(folder / "heldout.npz"), "select": 0.25, "test": str(folder / "test.npz")},
        "learn": {"batch_size": 8, "epochs": EPOCHS},
        "actors": {"replicas": 2, "shards": 1, "cpus": 1},
        "precision": "float32",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def measure(folder: Path) -> dict[str, float]:
    """Learn without faults and with them. Raises RuntimeError if the coefficients are not bit-identical."""
    from ray_soup.mixing.coefficients import load_coefficients
    from ray_soup.soups.records import finished_record

    write_inputs(folder)
    found, seconds = {}, {}
    lost: dict[str, float] = {}
    usual_s = 0.0
    for name in ("undisturbed", "disturbed"):
        start = time.perf_counter()
        run = Run(folder, name)
        try:
            if name == "disturbed":
                lost = disturb(run, usual_s)
            while run.keep_going():
                time.sleep(0.1)
        finally:
            run.clean()
        seconds[name] = time.perf_counter() - start
        found[name] = load_coefficients(run.out / "coefficients.safetensors").values
        usual_s = finished_record(run.out)["seconds"]["mehl+"] / EPOCHS
    results = {f"{name} (s)": value for name, value in seconds.items()} | {"starts of the command": run.starts} | lost
    for fault in FAULTS:
        results[f"{fault}: mean lost (s)"] = float(np.mean([v for k, v in lost.items() if fault in k]))
    if not np.array_equal(*found.values()):
        raise RuntimeError(f"The coefficients differ by up to {np.abs(np.subtract(*found.values())).max():.1e}.")
    results["coefficients that differ in a bit"] = 0
    return results


def main() -> dict[str, float]:
    """Run the benchmark in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # Ray's sockets need a short path
    try:
        return measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
