"""What a run records for Prometheus, with Ray's classes of metrics replaced by ones that keep the values."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.util.metrics

from ray_soup.actors import metrics
from ray_soup.actors.messages import MeshCounts, Partial
from ray_soup.io.progress import no_progress
from ray_soup.task import identity
from tests.conftest import ROOT

Values = dict[tuple[str, str], float]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Values:
    """The values of metrics by name and by the tags beside run and method."""
    values: Values = defaultdict(float)

    class Kept:
        def __init__(self, name: str, text: str, tags: tuple[str, ...]) -> None:
            self.name, self.tags = name, tags

        def key(self, tags: dict[str, str]) -> tuple[str, str]:
            assert set(tags) == set(self.tags)
            assert tags["run"] == identity.RUN[:8]
            return self.name, " ".join(tags[tag] for tag in self.tags if tag != "run")

        def inc(self, amount: float, tags: dict[str, str]) -> None:
            assert amount > 0
            values[self.key(tags)] += amount

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self.key(tags)] = value

    monkeypatch.setattr(ray.util.metrics, "Counter", Kept)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Kept)
    return values


def partial(seconds: float, combine: float = 0.0, project: float = 0.0) -> Partial:
    return Partial(np.zeros((1, 1)), 0.0, 0.0, 1.0, seconds, combine, project)


def test_the_parts_of_a_step_sum_to_its_duration() -> None:
    answers = [[partial(1.0, 0.5, 0.5), partial(3.0, 0.5, 0.25)], [partial(2.0, 0.25, 0.25)]]
    assert metrics.seconds_by_part(answers, 6.0) == {"combine": 0.75, "passes": 3.75, "project": 0.5, "driver": 1.0}


def test_a_run_counts_its_steps_losses_bytes_and_progress(found: Values) -> None:
    pool: Any = SimpleNamespace(counts=MeshCounts(actors=4))
    progress = metrics.observed(no_progress)
    with metrics.recording(pool, "mehl+", "s3://user:password@bucket/out"):
        for done in (0, 300, 1000):
            progress("3/12 reading ingredients", done, 1000)
        progress("3/12 learning mehl+", 0, 10)
        for _ in range(3):
            metrics.count_step([[partial(1.0, 0.25, 0.25)]], "learning", 128, 2000, 1.5)
        progress("3/12 learning mehl+", 3, 10)
        metrics.count_epoch(0.5)
        pool.counts = MeshCounts(lost=2, created=1, moved=4, actors=3)
        metrics.begin_soup("mehl")
    assert found == {
        ("soup_storage_bytes_total", "mehl+ reading ingredients"): 1000,
        ("soup_steps_total", "mehl+ learning"): 3,
        ("soup_examples_total", "mehl+ learning"): 384,
        ("soup_wire_bytes_total", "mehl+ learning"): 6000,
        ("soup_step_seconds_total", "mehl+ learning combine"): 0.75,
        ("soup_step_seconds_total", "mehl+ learning passes"): 1.5,
        ("soup_step_seconds_total", "mehl+ learning project"): 0.75,
        ("soup_step_seconds_total", "mehl+ learning driver"): 1.5,
        ("soup_actors_lost_total", "mehl"): 2,
        ("soup_actors_created_total", "mehl"): 1,
        ("soup_ranks_moved_total", "mehl"): 4,
        **{("soup_actors", method): n for method, n in (("mehl+", 4), ("mehl", 3))},
        **{("soup_select_nll", method): 0.5 for method in ("mehl+", "mehl")},
        **{("soup_run_info", f"{method} s3://[redacted]@bucket/out"): 1 for method in ("mehl+", "mehl")},
        **{
            (f"soup_phase_{name}", f"{phase}"): value
            for name, phase, value in (
                ("done", "mehl+ reading ingredients bytes", 0), ("units", "mehl+ reading ingredients bytes", 1000),
                ("done", "mehl+ learning mehl+ steps", 3), ("units", "mehl+ learning mehl+ steps", 10),
                ("done", "mehl learning mehl+ steps", 3), ("units", "mehl learning mehl+ steps", 10),
            )
        },
    }  # fmt: skip
    before = dict(found)
    progress("learning", 4, 10)
    metrics.count_step([[partial(1.0)]], "learning", 128, 2000, 1.5)  # outside of a run
    assert found == before


def test_metrics_that_cannot_be_recorded_do_not_end_the_run(found: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    with metrics.recording(None, "mehl+"):
        monkeypatch.setattr(identity, "RUN", "x")
        monkeypatch.setattr(metrics, "TAGS", {})
        metrics.count_step([[partial(1.0)]], "a phase without its tag", 1, 1, 1.5)


def test_the_dashboard_and_the_documentation_have_every_metric() -> None:
    names = {f"ray_soup_{name}" for name in (*metrics.COUNTERS, *metrics.GAUGES)}
    dashboard = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"ray_soup_\w+", " ".join(queries))) == names
    assert set(re.findall(r"ray_soup_\w+", (ROOT / "docs" / "watching.md").read_text())) == names
