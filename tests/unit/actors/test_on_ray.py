"""What Ray reports about calls that were lost, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray import exceptions

from ray_soup.actors.messages import Mesh
from ray_soup.actors.on_ray import RayPool
from ray_soup.recipe import make_recipe
from tests.conftest import values

LOST_OBJECTS: list[Exception] = [
    exceptions.ObjectLostError("00", None, ""),
    exceptions.OwnerDiedError("00", None, ""),
    exceptions.ObjectFetchTimedOutError("00", None, ""),
    exceptions.NodeDiedError("the node is dead"),
]


@pytest.mark.parametrize("error", LOST_OBJECTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_its_node_takes_along_is_a_loss(
    monkeypatch: pytest.MonkeyPatch, error: Exception, streamed: bool
) -> None:
    """An actor's large answers are in the object store of its node."""

    def get(reply: Any) -> str:
        if reply == "on a node that is gone":
            raise error
        return "an answer"

    monkeypatch.setattr(ray, "wait", lambda calls, num_returns, timeout: (calls[:num_returns], calls[num_returns:]))
    monkeypatch.setattr(ray, "get", get)
    pool, answers = RayPool(make_recipe(values(Path("/x"))), [], Mesh(2, 1), 1), dict[int, Any]()
    replies = ["here", "on a node that is gone"]
    calls = {rank: iter([reply]) if streamed else reply for rank, reply in enumerate(replies)}
    loss = pool._collect(calls, answers, (lambda *_: None) if streamed else None)
    assert answers == {0: "an answer"}
    assert loss is not None
    assert (loss.keys, loss.alone) == ({1}, frozenset())
    assert loss.reason == "its node ended before the driver had fetched its answer"
