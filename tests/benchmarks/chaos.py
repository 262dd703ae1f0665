"""Twenty faults in one learning run: the time that each costs, and the same bits at the end."""

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
EACH = 5
SEED = 1
EPOCHS = 600  # with a raylet killed a run goes on for up to 15 s, and is not to end in them
STEPS = 56  # of an epoch
PATIENCE_S = 20  # until a silent actor counts as lost; a starting one is silent while it imports
GIVE_UP_S = 180  # for one fault


class Run:
    """The command at work, started again whenever it ends before its soup is there."""

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
        self.starts += 1
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def keep_going(self) -> bool:
        """False once it is done. A run that fails must say why, and go on when it is started again."""
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
        """What the command has said since it was started."""
        return self._log.read_text()

    def saved(self) -> tuple[int, float]:
        """Steps in the last state that was saved, and when that was."""
        from ray_soup.learn import load_state

        file = self.out / "state" / "learn.pt"
        try:
            return load_state(file).steps, file.stat().st_mtime
        except FileNotFoundError:
            return 0, 0.0

    def family(self, what: str) -> list[psutil.Process]:
        """Its processes whose command line holds `what`, by their ids."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self._seen |= set(children)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    if what in " ".join(child.cmdline()) and child.status() != psutil.STATUS_STOPPED:
                        found.append(child)
        return sorted(found, key=lambda p: p.pid)

    def strike(self, fault: str, random: np.random.Generator) -> None:
        self.family("")
        if fault == "driver killed":
            self.process.kill()
            self.process.wait()
            return
        whom = self.family("RemoteShard")
        if fault == "raylet killed":
            whom = [p for p in self.family("raylet") if p.name() == "raylet"]
        victim = whom[int(random.integers(len(whom)))]
        victim.send_signal(signal.SIGSTOP if fault == "actor stopped" else signal.SIGKILL)

    def clean(self) -> None:
        """End what a killed driver or raylet left behind."""
        self.family("")
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in self._seen:
            with contextlib.suppress(psutil.Error):  # knows whether its id has gone to another process since
                process.kill()


def disturb(run: Run, usual_s: float) -> dict[str, float]:
    """One fault after the other, each some epochs after the run has got over the last. Seconds lost: from the last state
    saved before a fault to the first one after it, less the usual time for as many epochs."""
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
        run.strike(fault, random)
        # A run whose raylet is gone may go on for seconds, until its actors or its driver notice.
        again = fault in ("driver killed", "raylet killed")
        wait(run, lambda: not again or run.starts > starts, f"{number + 1:02} {fault}, noticed")  # noqa: B023
        reached = run.saved()[0]
        # an epoch may have been saved between the look and the strike
        wait(run, lambda: run.saved()[0] > max(before + STEPS, reached), f"{number + 1:02} {fault}, after")  # noqa: B023
        over, now = run.saved()
        lost[f"{number + 1:02} {fault}, step {before}: lost (s)"] = now - then - (over - before) / STEPS * usual_s
        print(
            f"{number + 1:02} {fault}: {now - then:.1f} s, {over - before} steps, {run.starts} starts; {run.said}",
            file=sys.stderr,
        )
    return lost


def wait(run: Run, what: Callable[[], object], when: str) -> None:
    started = time.monotonic()
    while not what():
        if not run.keep_going() or time.monotonic() - started > GIVE_UP_S:
            raise RuntimeError(f"Fault {when}: the run has ended, or stands still. {run.log()}")
        time.sleep(0.02)


def measure(folder: Path) -> dict[str, float]:
    from ray_soup.coefficients import load_coefficients
    from ray_soup.pipeline import finished_record
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
        raise RuntimeError(f"other coefficients: they differ by {np.abs(np.subtract(*found.values())).max():.1e}")
    results["coefficients with other bits"] = 0
    return results


def main() -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # Ray's sockets need a short path
    try:
        return measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
