"""Damage every kind of file that ray_soup reads: a user must get the right result, or a refusal that names the file.

    python -m tests.benchmarks fuzz                                    # 2,000 mutations, about ten minutes on two cores
    python -m tests.benchmarks.fuzz --count 200 --only torch --seed 7  # fewer, of one kind, other ones
    python -m tests.benchmarks.fuzz --only torch --attempt 123         # one again, with its output, in a folder that is kept

Each mutation runs in its own process. Right: exit 0, and the file's own library finds the same numbers. Refused: exit 2
or 3, and the message names the file. Anything else is a fault: a wrong number, a traceback, a crash, 2 GB of memory, 60 s.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from tests.benchmarks.fuzz_kinds import KINDS, Kind

COUNT = 2000
SECONDS = 60
MEGABYTES = 2000
GOOD = ("right", "exit 1", "exit 2", "exit 3")


@dataclass(frozen=True)
class Answer:
    """What one mutation led to."""

    kind: str
    attempt: int
    outcome: str
    """One of GOOD, or a fault."""
    file: str
    mutation: str
    said: str
    """The end of what the command printed."""


def in_child(work: Callable[[], object], log: Path) -> tuple[int, int, float]:
    """Run `work` in a forked process; return its exit code (negative: a signal), megabytes and seconds."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))  # a test runner's may lie elsewhere
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 0
        try:
            work()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1000, time.monotonic() - start
        if time.monotonic() - start > SECONDS:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)


def attempt(name: str, base: str, number: int, keep: bool = False) -> Answer:
    """Damage one file of one kind, run the command, and judge what it did; attempt 0 damages nothing."""
    kind, rng = KINDS[name], random.Random(f"{name} {number}")
    folder = Path(tempfile.mkdtemp(prefix="fuzz", dir=base if not keep else None))
    shutil.copytree(Path(base) / "base", folder, dirs_exist_ok=True)
    file, mutation = rng.choice(kind.files), rng.choice(kind.mutations)
    before = (folder / file).read_bytes()
    after = before
    while number and after == before:
        after = mutation(before, rng)
    (folder / file).write_bytes(after)
    log = folder / "log"
    try:
        code, megabytes, seconds = in_child(lambda: kind.command(folder), log)
        said = log.read_text(errors="replace") if log.exists() else ""
        outcome = judge(kind, folder, file, code, megabytes, seconds, said)
        if keep:
            print(f"{folder}: {file}, {mutation.__name__}, exit {code}, {megabytes} MB, {seconds:.1f} s\n{said}")
        return Answer(name, number, outcome, file, mutation.__name__, said[-1500:])
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def judge(kind: Kind, folder: Path, file: str, code: int, megabytes: int, seconds: float, said: str) -> str:
    """Name the outcome of one command."""
    if seconds > SECONDS:
        return "hangs"
    if code < 0:
        return f"dies of signal {-code}"
    if megabytes > MEGABYTES:
        return f"takes {megabytes} MB"
    if "Traceback (most recent call last)" in said or code == 99:
        return "traceback"
    if code == 0:
        log = folder / "check"
        wrong, *_ = in_child(lambda: kind.check(folder), log)
        if wrong == 0:
            return "right"
        return "wrong: " + (log.read_text(errors="replace").strip().splitlines() or [f"its library dies, {wrong}"])[-1][:150]
    if code not in (2, 3) and not (code == 1 and kind.may_fail):
        return f"exit {code}"
    path = Path(file)
    named = (
        path.name in said or kind.also_named in said or any(f"/{part}" in said for part in path.parts[:-1] if part != "zoo")
    )
    return f"exit {code}" if named or not kind.names_file else f"exit {code} without the file's name"


def good(answer: Answer) -> bool:
    """Return whether an answer is right, or a refusal in the documented way."""
    return answer.outcome in GOOD and not (answer.outcome == "exit 1" and not KINDS[answer.kind].may_fail)


def prepare(work: Path, names: list[str]) -> None:
    """Build the undamaged folder of each kind."""
    for name in names:
        (work / name / "base").mkdir(parents=True)
        code, *_ = in_child(lambda name=name: KINDS[name].build(work / name / "base"), work / name / "log")
        if code:
            raise RuntimeError(f"{name}: {(work / name / 'log').read_text()}")


def run(count: int, names: list[str], seed: int = 0, jobs: int = 2) -> list[Answer]:
    """Try `count` mutations, evenly over the kinds. Raises RuntimeError if a command fails on undamaged files."""
    import ray_soup.cli
    import ray_soup.mixing.kernels
    import ray_soup.soups.run  # noqa: F401 - the children share what is imported here

    work, threads = Path(tempfile.mkdtemp(prefix="ray_soup_fuzz")), torch.get_num_threads()
    cache = patch.dict(os.environ, {"RAY_SOUP_CACHE": str(work / "cache")})  # the children inherit it
    cache.start()
    torch.set_num_threads(1)
    try:
        prepare(work, names)
        each = -(-count // len(names))
        tasks = [(name, seed * 1_000_000 + number) for number in range(1, each + 1) for name in names]
        with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
            undamaged = list(pool.map(attempt, names, [str(work / n) for n in names], [0] * len(names)))
            wrong = [f"{a.kind}: {a.outcome}\n{a.said}" for a in undamaged if a.outcome not in KINDS[a.kind].undamaged]
            if wrong:
                raise RuntimeError("Undamaged files are not read right:\n" + "\n".join(wrong))
            chosen = tasks[:count]
            return list(
                pool.map(attempt, [n for n, _ in chosen], [str(work / n) for n, _ in chosen], [i for _, i in chosen])
            )
    finally:
        torch.set_num_threads(threads)
        cache.stop()
        shutil.rmtree(work, ignore_errors=True)


def table(answers: list[Answer]) -> str:
    """Show the outcomes of each kind, then every fault with how to repeat it."""
    kinds = dict.fromkeys(a.kind for a in answers)
    lines = [f"{'kind':<20} {'right':>6} {'exit 1':>7} {'exit 2':>7} {'exit 3':>7} {'faults':>7}"]
    for kind in kinds:
        counts = Counter(a.outcome if good(a) else "fault" for a in answers if a.kind == kind)
        lines.append(f"{kind:<20} {counts['right']:>6} " + " ".join(f"{counts[o]:>7}" for o in (*GOOD[1:], "fault")))
    for a in answers:
        if not good(a):
            last = (a.said.strip().splitlines() or [""])[-1]
            lines.append(
                f"FAULT --only '{a.kind}' --attempt {a.attempt}: {a.file}, {a.mutation}: {a.outcome} | {last[:200]}"
            )
    return "\n".join(lines)


def main() -> dict[str, float]:
    """Run the default number of mutations."""
    answers = run(COUNT, list(KINDS))
    print(table(answers))
    totals = Counter(a.outcome if good(a) else "faults" for a in answers)
    return {"mutations": len(answers), **{name: float(totals[name]) for name in (*GOOD, "faults")}}


def command() -> None:
    """Run what the command line asks for; exit 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds, separated by semicolons")
    parser.add_argument("--attempt", type=int)
    options = parser.parse_args()
    names = options.only.split(";") if options.only else list(KINDS)
    if options.attempt is not None:
        work = Path(tempfile.mkdtemp(prefix="ray_soup_fuzz"))
        prepare(work, names)
        print(attempt(names[0], str(work / names[0]), options.attempt, keep=True).outcome)
        return
    answers = run(options.count, names, options.seed)
    print(table(answers))
    sys.exit(any(not good(a) for a in answers))


if __name__ == "__main__":
    command()
