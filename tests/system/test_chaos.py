"""A short form of the benchmark `chaos`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_faults_change_no_bit() -> None:
    """Of actors, nodes, storage and the driver, in a run that is disturbed until there were three."""
    command = [sys.executable, "-m", "tests.benchmarks.chaos", "--faults", "3", "--epochs", "4", "--patience", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "every soup had the bits of the one that was learned without a fault" in done.stderr
