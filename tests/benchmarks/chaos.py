"""Runs that are disturbed: how much time each kind of fault costs, and whether the soups keep their bits.

    python -m tests.benchmarks.chaos                                 # 20 faults
    python -m tests.benchmarks.chaos --faults 1000 --write           # over several runs

With --write the faults are added to those of earlier calls, in chaos.json, and the table of all goes into docs/faults.md.

A run learns on four actors, on nodes that come and go, with ingredients, data and OUT in S3. Faults are injected one after
another until it ends, and then into the next run, until there were enough. They and their times are drawn by a seed. Every
soup must have the bits of one that was learned without a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.benchmarks.chaos_parts import IMPATIENT, Nodes, Run, storage_at, write_inputs
from tests.s3_server import FAULTS as STORAGE_FAULTS
from tests.s3_server import S3Server

WEIGHTS = {
    "actor killed": 6, "actor stopped": 1, "node drained": 2, "node terminated": 2, "node removed": 2, "node added": 6,
    "storage fails": 4, "driver killed": 1, "driver terminated": 1,
}  # fmt: skip
"""The kinds of faults, and how often each is drawn."""
FIRST, MOST = 3, 4
"""Nodes at the beginning, and at most."""
PATIENCE_S = 20.0
"""Seconds until a silent actor counts as lost, on a quiet machine; one that starts is silent while it imports."""
NOTICE_S = 5.0
"""Seconds from the announcement of a node's end to its end."""
TOGETHER = 0.6
"""The share of faults after which another one comes at once; none comes after one that ends the driver."""
GIVE_UP_S = 300
"""Seconds without progress after which a run counts as stuck."""
RECIPE = {
    "method": "mehl+",
    "learn": {"batch_size": 8, "epochs": 600},
    "actors": {"replicas": 4, "shards": 1, "cpus": 0.5, "wait_s": 60},
    "precision": "float32",
}
DOCS = Path(__file__).parent.parent.parent / "docs" / "faults.md"
RECORD = Path(__file__).parent / "chaos.json"


@dataclass
class Chaos:
    """The faults of all runs: what there is, and what was lost.

    Args:
        nodes: the cluster.
        server: the storage.
        random: draws the faults and their times.
        pace: steps per second of a run without faults.
        patience_s: seconds until a silent actor counts as lost.
    """

    nodes: Nodes
    server: S3Server
    random: np.random.Generator
    pace: float
    patience_s: float = PATIENCE_S
    lost: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds that each fault cost, by kind; that of faults which came together counts for both in equal parts."""
    _due: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    """What ends a fault, and when."""

    @property
    def count(self) -> int:
        """The faults so far."""
        return sum(map(len, self.lost.values()))

    def choose(self) -> str:
        """Draw a kind of fault that is possible now."""
        nodes = len(self.nodes.alive)
        weights = dict(WEIGHTS)
        if nodes == 0:
            return "node added"
        if nodes == MOST:
            weights["node added"] = 0
        if nodes == 1:
            weights |= {"node drained": 0, "node terminated": 0, "node removed": 1}
        if not self.nodes.actors():
            weights |= {"actor killed": 0, "actor stopped": 0}
        share = np.array(list(weights.values()), dtype=float)
        return str(self.random.choice(list(weights), p=share / share.sum()))

    def inject(self, fault: str, run: Run) -> None:
        """Inject one fault."""
        node = self.nodes.alive[int(self.random.integers(len(self.nodes.alive)))] if self.nodes.alive else None
        if fault in ("actor killed", "actor stopped"):
            self._hit_actor(fault)
        elif fault == "node added":
            self.nodes.add()
        elif fault == "node drained":
            self.nodes.drain(node, NOTICE_S)
            self._later(NOTICE_S, lambda: self.nodes.remove(node, signal.SIGTERM))
        elif fault == "node terminated":
            self.nodes.remove(node, signal.SIGTERM)
        elif fault == "node removed":
            self.nodes.remove(node, signal.SIGKILL)
        elif fault == "storage fails":
            self.server.fail(str(self.random.choice(STORAGE_FAULTS)), float(self.random.uniform(1, 10)))
        elif fault == "driver killed":
            run.process.kill()
        else:
            run.process.terminate()

    def _hit_actor(self, fault: str) -> None:
        actors = self.nodes.actors()
        if not actors:
            return
        actor = actors[int(self.random.integers(len(actors)))]
        with suppress(psutil.Error):
            if fault == "actor killed":
                actor.kill()
            else:
                actor.suspend()
                self._later(self.patience_s * 1.5, lambda: _resume(actor))

    def _later(self, seconds: float, what: Callable[[], object]) -> None:
        self._due.append((time.monotonic() + seconds, what))

    def tick(self) -> None:
        """End the faults that are due."""
        now = time.monotonic()
        for item in [item for item in self._due if item[0] <= now]:
            self._due.remove(item)
            item[1]()

    def disturb(self, run: Run, until: Callable[[], bool]) -> None:
        """Inject faults into a run until it ends by itself, or `until` says that there were enough; then let it end."""
        kinds, then, before = list[str](), time.monotonic(), 0
        while not until() and self._wait(run, self._progress_since(run)):
            # What was lost counts until the run continues, which it has done once it saved a state.
            kinds, then, before = self._count(run, kinds, then, before)
            pause = time.monotonic() + float(self.random.uniform(0, 1.5))
            if not self._wait(run, lambda p=pause: time.monotonic() > p):
                break
            while not kinds or (self.random.random() < TOGETHER and not kinds[-1].startswith("driver")):
                kinds.append(self.choose())
                print(f"{self.count + len(kinds):4} {kinds[-1]}, step {run.saved()}", file=sys.stderr, flush=True)
                self.inject(kinds[-1], run)
        self._wait(run, lambda: False)
        self._count(run, kinds, then, before)

    def _count(self, run: Run, kinds: list[str], then: float, before: int) -> tuple[list[str], float, int]:
        """Count what was lost since `then`, with `before` steps done; begin to count again."""
        now, steps = time.monotonic(), run.saved() or before
        for kind in kinds:
            self.lost[kind].append((now - then - (steps - before) / self.pace) / len(kinds))
        return [], now, steps

    def _progress_since(self, run: Run) -> Callable[[], bool]:
        """Return whether the run has continued since this moment; after a restart, from where it resumed."""
        known: int | None = run.saved()

        def progressed() -> bool:
            nonlocal known
            steps = run.saved()
            if not steps:  # not yet, or a new start has not yet fetched the state
                known = known and None
            elif known is None:
                known = steps
            else:
                known = min(known, steps)
                return steps > known
            return False

        return progressed

    def _wait(self, run: Run, what: Callable[[], bool]) -> bool:
        """Wait until `what` is true, and return False if the run has ended by then. Raises RuntimeError if it is stuck."""
        progress, seen = time.monotonic(), run.saved()
        while not what():
            self.tick()
            if not run.keep_going():
                return False
            steps = run.saved()
            if steps != seen:
                progress, seen = time.monotonic(), steps
            if not self.nodes.alive:  # no run could continue
                self.nodes.add()
            if time.monotonic() - progress > GIVE_UP_S:
                raise RuntimeError(f"The run is stuck after step {steps}. {run.log()}")
            time.sleep(0.05)
        return True


def _resume(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.resume()


def digests(run: Run) -> dict[str, str]:
    """Return the digests of the files of a soup and of its coefficients."""
    from ray_soup.io import storage
    from ray_soup.mixing.coefficients import load_coefficients

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "coefficients.safetensors"
        copy.write_bytes(storage.read_bytes(f"{run.out}/coefficients.safetensors"))
        values = load_coefficients(copy).values
    model = storage.read_bytes(f"{run.out}/model.safetensors")
    return {name: hashlib.sha256(data).hexdigest() for name, data in {"c": values.tobytes(), "model": model}.items()}


def learned(run: Run) -> tuple[int, float]:
    """Return the steps of a finished run, and the seconds that they took."""
    from ray_soup.io import storage

    record = json.loads(storage.read_bytes(f"{run.out}/run.json"))
    return record["steps"], record["seconds"][RECIPE["method"]]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Learn a soup without faults, and disturb as many runs as it takes. Raises RuntimeError if a soup differs."""
    started = time.monotonic()
    server = S3Server(folder)
    nodes = None
    runs: list[Run] = []
    try:
        bucket = storage_at(server, f"b{secrets.token_hex(6)}")
        write_inputs(folder, f"{bucket}/inputs", {**RECIPE, "learn": {**RECIPE["learn"], "epochs": options.epochs}})  # type: ignore[dict-item]
        nodes = Nodes(FIRST, 1)
        environment = {"RAY_ADDRESS": nodes.address}
        first = Run(folder, f"{bucket}/undisturbed", environment)
        runs.append(first)
        while first.keep_going():
            time.sleep(0.1)
        expected, (steps, seconds) = digests(first), learned(first)
        print(f"without faults: {steps} steps in {seconds:.1f} s", file=sys.stderr, flush=True)
        chaos = Chaos(nodes, server, np.random.default_rng(options.seed), steps / seconds, options.patience)

        def enough() -> bool:
            return chaos.count >= options.faults or time.monotonic() - started > 60 * options.minutes

        while not enough():
            run = Run(folder, f"{bucket}/disturbed{len(runs)}", environment)
            runs.append(run)
            chaos.disturb(run, enough)
            if digests(run) != expected:
                raise RuntimeError(f"The soup of run {len(runs) - 1} differs.")
            said = f"run {len(runs) - 1}: the same bits; {run.starts} starts; {run.given_up}"
            print(f"{said}\n{table(dict(chaos.lost))}", file=sys.stderr, flush=True)
    finally:
        for run in runs:
            run.end()
        if nodes is not None:
            nodes.close()
        server.close()
    return {
        "lost": dict(chaos.lost), "runs": len(runs) - 1, "starts": sum(run.starts for run in runs[1:]),
        "given_up": [said for run in runs for said in run.given_up], "seconds": time.monotonic() - started,
        "seed": options.seed, "patience_s": options.patience, "epochs": options.epochs,
    }  # fmt: skip


def table(lost_by: dict[str, list[float]]) -> str:
    """Return the seconds lost, by kind of fault, as Markdown."""
    lines = ["| fault | number | seconds lost, median | mean | most |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind in WEIGHTS:
        lost = lost_by.get(kind, [])
        if lost:
            figures = f"{np.median(lost):.1f} | {np.mean(lost):.1f} | {np.max(lost):.1f}"
            lines.append(f"| {kind} | {len(lost)} | {figures} |")
    return "\n".join(lines)


def sentence(found: dict[str, Any]) -> str:
    """Return what was found, in one sentence for the docs."""
    count, minutes = sum(map(len, found["lost"].values())), found["seconds"] / 60
    runs = f"{found['runs']} run{'s' * (found['runs'] > 1)}"
    return (
        f"{count:,} faults in {runs}, {minutes:.0f} minutes: every soup had the bits of the one that was learned without a "
        f"fault. The command was started {found['starts']} times; {len(found['given_up'])} times it had ended by itself, "
        "with a sentence that says so."
    )


def write(found: dict[str, Any]) -> None:
    """Add what was found to that of earlier calls, and put the table of all into docs/faults.md, between its marks."""
    lost = {kind: [round(seconds, 1) for seconds in values] for kind, values in found["lost"].items()}
    calls = [*json.loads(RECORD.read_text()), {**found, "lost": lost}] if RECORD.exists() else [{**found, "lost": lost}]
    RECORD.write_text("[\n" + ",\n".join(map(json.dumps, calls)) + "\n]\n")
    total: dict[str, Any] = {name: sum(call[name] for call in calls) for name in ("runs", "starts", "seconds")}
    total["given_up"] = [said for call in calls for said in call["given_up"]]
    total["lost"] = {kind: [s for call in calls for s in call["lost"].get(kind, [])] for kind in WEIGHTS}
    text = DOCS.read_text()
    new = f"<!-- chaos -->\n{sentence(total)}\n\n{table(total['lost'])}\n<!-- end of chaos -->"
    DOCS.write_text(re.sub(r"<!-- chaos -->.*<!-- end of chaos -->", lambda _: new, text, flags=re.DOTALL))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the benchmark in a temporary folder; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="at least this number of faults")
    parser.add_argument("--minutes", type=float, default=600, help="but no new ones after this number of minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=600, help="epochs of a run, of 56 steps each")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="RAY_SOUP_DEADLINE_S")
    parser.add_argument("--write", action="store_true", help="add the faults to chaos.json and docs/faults.md")
    options = parser.parse_args(arguments or [])
    folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # Ray's sockets need a short path
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(IMPATIENT)
    os.environ.update({
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder), "RAY_SOUP_CACHE": str(folder / "cache"), "RAY_SOUP_DEADLINE_S": str(options.patience),
    })  # fmt: skip
    try:
        found = measure(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{sentence(found)}\n\n{table(found['lost'])}", *found["given_up"], sep="\n", file=sys.stderr)
    if options.write:
        write(found)
    return {f"{kind}: mean lost (s)": float(np.mean(lost)) for kind, lost in found["lost"].items()} | {
        "faults": sum(map(len, found["lost"].values())), "runs": found["runs"], "starts of the command": found["starts"],
        "coefficients that differ in a bit": 0,
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
