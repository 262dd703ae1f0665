"""The plan of a run on clusters of several sizes: mesh, memory, time, cost, and where more nodes stop paying off."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from ray_soup.actors.messages import Mesh
from ray_soup.actors.placement import LIBRARY_BYTES, PROCESS_BYTES, actor_bytes, actors_on, cpus_of_each, replicas_on
from ray_soup.errors import RecipeError
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.blocks import partition
from ray_soup.recipe import Recipe, with_changes
from ray_soup.recipe.fields import MOST_ACTORS
from ray_soup.soups.cluster_plan.devices import Cluster, parse_cluster
from ray_soup.soups.cluster_plan.shapes import Work, count_work, ingredients_of, sizes_of
from ray_soup.soups.cluster_plan.speeds import measure_here, sharing, speeds_on, uses_bfloat16
from ray_soup.soups.costs import Costs, Speeds, Workload, run_seconds
from ray_soup.soups.granularity import resolved_blocks, stages
from ray_soup.soups.model_batch import requested_model_batch
from ray_soup.task.data import cut_splits
from ray_soup.task.libraries import LIBRARIES
from ray_soup.task.model_spec import in_bfloat16
from ray_soup.task.preprocessing import completed, examine

CONTEXT_BYTES = 0.6e9  # of a CUDA context and cuBLAS in GPU memory: assumed
FULL = 0.9  # share of a device's memory that an actor may take
WORTHWHILE = 1.25  # how many times as fast twice as many nodes must be


@dataclass(frozen=True)
class Case:
    """A recipe on one kind of cluster, with everything that does not depend on the number of nodes."""

    recipe: Recipe
    cluster: Cluster
    work: Work
    load: Workload
    """With the model batch that the recipe asks for."""
    speeds: Speeds
    cpus: float
    """CPUs per actor."""

    @property
    def actors_per_node(self) -> int:
        """How many actors a node has room for."""
        if self.cluster.device:
            return actors_on(self.cluster.devices, self.recipe.actors.gpus)
        return int(self.cluster.devices / self.cpus)

    @property
    def least_nodes(self) -> int:
        """How few nodes have room for a replica."""
        shards = self.recipe.actors.shards
        return 1 if shards == "auto" else -(-shards // self.actors_per_node)

    @property
    def device_bytes(self) -> float:
        """Bytes of memory for one actor: of the one GPU that it computes on, or its share of that or of this machine's."""
        if self.cluster.device is None:
            return psutil.virtual_memory().total / self.actors_per_node
        return self.cluster.device.memory * min(1, self.recipe.actors.gpus)

    @property
    def process_bytes(self) -> float:
        """Bytes of an actor's process, with the library that building the model has imported here, if it was one."""
        return PROCESS_BYTES - (0 if LIBRARIES.keys() & sys.modules.keys() else LIBRARY_BYTES)

    def memory(self, model_batch: int, mesh: Mesh) -> float:
        """Estimate the bytes that an actor takes: of GPU memory if it has a GPU."""
        low = self.cluster.device is not None and uses_bfloat16(self.cluster.device, self.recipe)
        low = low and not in_bfloat16(self.recipe.model)  # whose activations and weights were counted in bfloat16
        part = min(self.speeds.micro_batch, -(-self.recipe.learn.batch_size // mesh.size))
        kept = part * self.work.saved * (0.5 if low else 1.0) + 2 * self.load.parameters * low  # and weights in bfloat16
        fixed = kept + (self.process_bytes if self.cluster.device is None else CONTEXT_BYTES)
        return actor_bytes(self.recipe, self.load.parameters, model_batch, mesh.shards, fixed)

    def fits(self, model_batch: int, mesh: Mesh) -> bool:
        """Return whether an actor has the memory for this model batch."""
        return self.memory(model_batch, mesh) <= FULL * self.device_bytes

    def mesh(self, actors: int) -> Mesh:
        """Return the mesh for this many actors: as few shards as fit into memory."""
        wanted = self.recipe.actors
        shards = 1 if wanted.by_layer else self._least_shards(actors) if wanted.shards == "auto" else wanted.shards
        return Mesh(replicas_on(self.recipe, actors, shards), shards)

    def _least_shards(self, actors: int) -> int:
        """Return the least number of shards that fit into memory; all of a node's if none does."""
        most, least = min(actors, self.actors_per_node), self._model_batches()[-1]  # a replica stays on one node
        return next((s for s in range(1, most) if self.fits(least, Mesh(max(1, actors // s), s))), most)

    def _model_batches(self) -> list[int]:
        """Return the sizes that the model batch may have, largest first."""
        most, fixed = self.load.model_batch, self.recipe.learn.model_batch != "auto" or self.recipe.info.kind == "softmax"
        return [most] if fixed else sorted({-(-most // parts) for parts in range(1, most + 1)}, reverse=True)

    def costs(self, nodes: int) -> Costs:
        """Return the costs on this many nodes. Raises RecipeError."""
        actors = min(nodes * self.actors_per_node, MOST_ACTORS)
        mesh = self.mesh(actors)
        if mesh.shards > actors:
            raise RecipeError(
                f"actors.shards is {mesh.shards}, and {_many(nodes, 'node')} of {self.cluster.node} can hold "
                f"{_many(actors, 'actor')}; expected room for all shards of a replica. Lower actors.shards, or plan with "
                f"--nodes {self.least_nodes} or more."
            )
        sizes = self._model_batches()
        load = replace(self.load, model_batch=next((m for m in sizes if self.fits(m, mesh)), sizes[-1]))
        speeds = self.speeds
        if mesh.shards > self.actors_per_node:  # slices between shards cross the network
            speeds = replace(speeds, link_s=max(speeds.link_s, speeds.wire_s))
        return Costs(load, speeds, mesh, min(mesh.size, actors // mesh.shards * mesh.shards))

    def wall_s(self, nodes: int) -> float:
        """Return the seconds of the whole run."""
        return sum(run_seconds(self.costs(nodes), self.cpus).values())


@shown_in_notebooks
def plan_cluster(
    recipe: Recipe,
    cluster: str,
    nodes: Sequence[int] = (1,),
    price: float | None = None,
    ingredients: int | None = None,
    examples: int | None = None,
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Estimate a run on clusters of several sizes. Raises SoupError.

    Args:
        recipe: the recipe.
        cluster: a node, as in `8 x H100-80GB, 100 Gbit`; `here` and `N x CPU` are measured on this machine.
        nodes: numbers of nodes.
        price: of a node, per hour, in any currency.
        ingredients: number of ingredients; None: that of the files.
        examples: number of examples of each source of data; None: those of the files.
        progress: called with what is being done, the units done so far, and the units in total.

    Returns what `ray-soup plan --cluster --json` prints.
    """
    case = open_case(recipe, parse_cluster(cluster), ingredients, examples, progress)
    wrong = [count for count in nodes if not 1 <= count <= MOST_ACTORS]
    if wrong or not nodes:
        raise RecipeError(f"--nodes: found {wrong[0] if wrong else 'none'}; expected numbers from 1 to {MOST_ACTORS:,}.")
    device, load = case.cluster.device, case.load
    low = in_bfloat16(case.recipe.model) or (device is not None and uses_bfloat16(device, case.recipe))
    stop, why = where_scaling_stops(case)
    return {
        "method": case.recipe.method,
        "node": case.cluster.node,
        "source": device.source if device else "measured on this machine",
        "precision": "bfloat16" if low else "float32",
        "ingredients": load.ingredients,
        "parameters": load.parameters,
        "blocks": load.blocks,
        "examples": load.sizes,
        "bytes_read": load.nbytes,
        "flops_per_example": case.work.flops,
        "plans": [_figures(case, count, price) for count in sorted(set(nodes))],
        "scaling_stops_at": stop,
        "why": why,
    }


def open_case(
    recipe: Recipe, cluster: Cluster, ingredients: int | None, examples: int | None, progress: ProgressCallback
) -> Case:
    """Count the work of a recipe, and find or measure the speeds of a device. Raises SoupError."""
    if not recipe.info.learns:
        raise RecipeError(
            f"plan: the method {recipe.method} learns nothing; expected a method that learns coefficients. Choose one, as "
            "in method=mehl+."
        )
    recipe = with_changes(recipe, {"actors.gpus": (recipe.actors.gpus or 1) if cluster.device else 0})
    cpus = cpus_of_each(recipe, cluster.devices)
    needs = recipe.actors.gpus if cluster.device else cpus
    if not 0 < needs <= cluster.devices:
        raise RecipeError(
            f"actors.{'gpus' if cluster.device else 'cpus'} is {needs:g}, and a node has {cluster.node}; expected more than "
            "0, and no more than a node has. Change it, or --cluster."
        )
    progress("counting operations", 0, 1)
    found = ingredients_of(recipe, ingredients)
    recipe = recipe if isinstance(found, int) else completed(recipe, examine(recipe, found).adopted)
    work = count_work(recipe)
    count = found if isinstance(found, int) else len(found)
    nbytes = 4 * work.layout.numel * count if isinstance(found, int) else sum(one.nbytes for one in found)
    splits = cut_splits(recipe.data, sizes_of(recipe, examples), None, recipe.learn.seed)
    sizes = {"select": 0} | {name: len(split) for name, split in splits.items()}
    kind = resolved_blocks(recipe.blocks, work.layout, count, sizes["fit"])
    load = Workload(
        recipe, count, work.layout.numel, partition(work.layout, kind).count, requested_model_batch(recipe, count), sizes,
        nbytes, recipe.buffers in ("auto", "recalibrate") and bool(work.layout.tracking), stages=stages(recipe, kind),
    )  # fmt: skip
    if cluster.device:
        speeds = speeds_on(cluster.device, work, recipe, cluster.network)
    else:
        progress("measuring this machine", 0, 1)
        speeds = measure_here(recipe, work, cluster, max(1, int(cpus)), load.model_batch)
    return Case(recipe, cluster, work, load, sharing(speeds, min(1, needs)), cpus)


def _figures(case: Case, nodes: int, price: float | None) -> dict[str, Any]:
    """Return the figures of a run on this many nodes."""
    costs = case.costs(nodes)
    mesh, load = costs.mesh, costs.work
    seconds, parts = run_seconds(costs, case.cpus), costs.step_parts(case.recipe.learn.batch_size)
    memory, wall = case.memory(load.model_batch, mesh), sum(seconds.values())
    per_node = min(case.actors_per_node, -(-costs.actors // nodes))
    host = memory if case.cluster.device is None else case.process_bytes + 4 * load.parameters
    found = {
        "nodes": nodes,
        "actors": costs.actors,
        "mesh": {"replicas": mesh.replicas, "shards": mesh.shards, "cpus": case.cpus, "gpus": case.recipe.actors.gpus},
        "model_batch": load.model_batch,
        "memory_bytes_per_actor": int(memory),
        "memory_fits": case.fits(load.model_batch, mesh),
        "memory_bytes_per_node": int(per_node * host),
        "store_bytes_per_node": int(load.parameters * load.stored),
        "steps": load.steps,
        "step_s": sum(parts.values()),
        "step_parts_s": parts,
        "seconds": seconds,
        "wall_s": wall,
    }
    return found if price is None else {**found, "cost": price * nodes * wall / 3600}


REASONS = {
    "combine and project": "every replica mixes all parameters for itself at every step, whatever its part of the batch",
    "the shortest passes": "a pass over a few examples takes as long as one over some more",
    "the network": "coordinates and gradients of every actor pass through the driver's network",
    "the driver": "it calls every actor, or one relay for 16 of them, at every step",
    "what is done once": "starting, reading the ingredients and writing the model take as long on any number of nodes",
}
REMEDIES = {
    "combine and project": "A larger learn.batch_size shares that work among more examples.",
    "the shortest passes": "A larger learn.batch_size gives every actor more to do.",
    "the network": "A coarser `blocks` or a smaller learn.model_batch sends less.",
    "the driver": "A larger learn.batch_size makes fewer, longer steps.",
    "what is done once": "More epochs or examples would change that.",
}


def where_scaling_stops(case: Case) -> tuple[int, str]:
    """Return the number of nodes from which on twice as many are not WORTHWHILE times as fast, and why, in a sentence."""
    nodes, most = case.least_nodes, max(1, MOST_ACTORS // case.actors_per_node)
    while 2 * nodes <= most and case.wall_s(nodes) / case.wall_s(2 * nodes) >= WORTHWHILE:
        nodes *= 2
    if 2 * nodes > most:
        return nodes, f"Scaling does not stop before {nodes} nodes, the most that a run can use."
    gain = case.wall_s(nodes) / case.wall_s(2 * nodes)
    before, after = (_fixed_seconds(case, count) for count in (nodes, 2 * nodes))
    halved = 0.5 if gain >= 1 else 1.0  # what is slower than before is so because of what grew
    what = max(after, key=lambda part: after[part] - halved * before[part])
    share = after[what] / case.wall_s(2 * nodes)
    reason, examples = REASONS[what], case.recipe.learn.batch_size
    if what == "the shortest passes" and case.costs(2 * nodes).mesh.size > examples:
        reason = f"a batch of {examples} examples has no more parts than that"
    return nodes, (
        f"Scaling stops at {_many(nodes, 'node')}: {2 * nodes} would be only {gain:.2f} times as fast, because of {what} "
        f"({share:.0%} of the time there): {reason}. {REMEDIES[what]}"
    )


def _fixed_seconds(case: Case, nodes: int) -> dict[str, float]:
    """Return the seconds of a run that more nodes do not shorten, by what they are spent on."""
    costs = case.costs(nodes)
    parts, seconds = costs.step_parts(case.recipe.learn.batch_size), run_seconds(costs, case.cpus)
    learning, wall, step = seconds["learning"], sum(seconds.values()), sum(parts.values())
    spent = {
        "combine and project": parts["combine"] + parts["project"],
        "the shortest passes": min(parts["passes"], costs.turns * case.speeds.step(1)),
        "the network": parts["wire"],
        "the driver": parts["driver"],
    }
    return {name: s / step * learning for name, s in spent.items()} | {"what is done once": wall - learning}


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
