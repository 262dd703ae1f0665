"""The nodes of a cluster: whether all of them see what the driver sees."""

from __future__ import annotations

from collections.abc import Sequence

from ray_soup.actors.baker import not_seen


def check_seen(paths: Sequence[str], patience_s: float) -> None:
    """Check that every node with CPUs sees these local files of the driver; a node that does not answer counts as lost.

    Args:
        paths: the files.
        patience_s: seconds to wait for the nodes.

    Raises RecipeError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not paths or len(nodes) < 2:
        return

    def missing() -> list[str]:  # a worker imports nothing for it
        import os

        return [path for path in paths if not os.path.exists(path)]

    task = ray.remote(num_cpus=0, max_retries=0)(missing)
    calls = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        calls[task.options(scheduling_strategy=place).remote()] = node["NodeManagerHostname"]
    ready, waiting = ray.wait(list(calls), num_returns=len(calls), timeout=patience_s)
    for call in waiting:
        ray.cancel(call, force=True)
    for call in ready:
        try:
            found = ray.get(call)
        except ray.exceptions.RayError:
            continue
        if found:
            raise not_seen(found[0], "does not exist", calls[call])
