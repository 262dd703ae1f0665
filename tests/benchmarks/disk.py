"""Let every write of every command fail, once each, and print the faults that a command does not survive.

python -m tests.benchmarks.disk                  # all commands, over an hour
python -m tests.benchmarks.disk learn finetune   # some
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests import tiny
from tests.disk_sweep import ERRORS, check_fault, commands_of, in_this_process, writes_of


def main(names: list[str] | None = None) -> dict[str, float]:
    """Return for each command its writes, how many of them it does not survive, and the seconds that it took."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made, in_this_process():
        zoo, one = Path(made) / "zoo", Path(made) / "one"
        (zoo / "zoo").mkdir(parents=True)
        (Path(made) / "inputs").mkdir()
        tiny.write_data(zoo)
        tiny.write_zoo(zoo / "zoo", 3)
        for name, command in commands_of(zoo, Path(made) / "inputs").items():
            if names and name not in names:
                continue
            start, failures = time.monotonic(), 0
            disk, right = writes_of(command, one)
            for fails_at in range(disk.count):
                if fails_at % 100 == 99:
                    print(f"{name}: {fails_at + 1} of {disk.count} writes", file=sys.stderr)
                number = ERRORS[fails_at % len(ERRORS)]
                try:
                    check_fault(command, right, one, number, fails_at)
                except Exception as error:
                    failures += 1
                    print(f"{name}, write {fails_at}, {os.strerror(number)}: {type(error).__name__}: {error}", flush=True)
                    shutil.rmtree(one, ignore_errors=True)
            seconds = time.monotonic() - start
            found |= {f"{name}: writes": disk.count, f"{name}: faults": failures, f"{name}: seconds": seconds}
            print(f"{name}: {disk.count} writes, {failures} faults, {seconds:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
