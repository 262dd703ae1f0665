"""Plans for clusters that do not exist, compared with arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.actors.messages import Mesh
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.progress import no_progress
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.cluster_plan.devices import DEVICES, Cluster, find_device, parse_cluster
from ray_soup.soups.cluster_plan.predict import WORTHWHILE, Case, open_case, plan_cluster, where_scaling_stops
from ray_soup.soups.cluster_plan.shapes import count_work, sizes_of
from ray_soup.soups.cluster_plan.speeds import BUSY, LINK_S, STEP
from ray_soup.soups.cluster_plan.text import closing, lines, table
from ray_soup.soups.costs import Costs, Line, Speeds, Workload, run_seconds
from tests.conftest import values
from tests.unit.task.language_models import byte_tokenizer, llama, saved

WIDE = "tests.unit.soups.test_cluster_plan:wide"
NODE = "8 x H100-80GB, 100 Gbit"
AUTO = {"replicas": "auto", "shards": "auto", "cpus": "auto"}


def wide() -> torch.nn.Module:
    """Two products of 256 x 1024: 1,048,576 FLOP of a forward pass over one example."""
    return torch.nn.Sequential(torch.nn.Linear(256, 1024, bias=False), torch.nn.Linear(1024, 256, bias=False))


def written(folder: Path) -> str:
    np.savez(folder / "wide.npz", images=np.zeros((6, 256), np.float32), labels=np.zeros(6, np.int64))
    return str(folder / "wide.npz")


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """A recipe of `wide` without checkpoints."""
    plain = {"model": WIDE, "data": {"fit": written(folder)}, "learn": {"batch_size": 64, "epochs": 2, "model_batch": 10}}
    return make_recipe({**plain, "ingredients": "none/*.safetensors", "blocks": "tensor", **changes})


def case_of(folder: Path, cluster: Cluster | None = None, **changes: Any) -> Case:
    recipe = recipe_of(folder, **changes)
    return open_case(recipe, cluster or parse_cluster(NODE), 20, 1000, no_progress)


@pytest.mark.parametrize(
    ("text", "devices", "name", "network"),
    [
        ("8 x H100-80GB, 100 Gbit", 8, "H100-80GB", 100),
        ("4×nvidia a100 40gb,25Gbit/s", 4, "A100-40GB", 25),
        ("L4", 1, "L4-24GB", 10),
        ("2 x CPU", 2, None, 10),
    ],
)
def test_a_cluster_is_read_from_text(text: str, devices: int, name: str | None, network: float) -> None:
    found = parse_cluster(text)
    assert (found.devices, found.device and found.device.name, found.network) == (devices, name, network)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8 x", "found '8 x'; expected the devices of one node and its network, as in '8 x H100-80GB, 100 Gbit', '4 x CPU'"),
        ("2 x Z80", "'Z80' is not in the table of devices; expected one of B200-180GB, "),
        ("A100", "'A100' could be any of A100-80GB, A100-40GB. Choose one."),
        ("800 x T4", "found 800 devices in a node; expected 1 to 64. Give the devices of one node here, and the number of"),
        ("T4, 0 Gbit", "a network of 0 Gbit/s; expected more"),
    ],
)
def test_an_unreadable_cluster_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_cluster(text)
    assert said in str(caught.value)


def test_every_device_has_a_name_of_its_own_and_a_source() -> None:
    for device in DEVICES:
        assert find_device(device.name) is device
        assert device.source
        assert device.name.endswith(f"-{device.memory / 1e9:.0f}GB")


def test_a_pass_is_counted_on_shapes_alone(tmp_path: Path) -> None:
    work = count_work(recipe_of(tmp_path))
    assert work.layout.numel == 2 * 256 * 1024
    assert work.flops == 2 * work.layout.numel
    assert work.saved == 4 * (256 + 1024)  # inputs of both layers


class Two(torch.nn.Module):
    """Inputs by name, and one number for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(256, 1, bias=False), torch.nn.Linear(8, 1, bias=False)

    def forward(self, wide: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return self.first(wide) + self.second(more)


def test_arrays_of_other_names_and_targets_that_are_no_classes_are_planned(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, model="tests.unit.soups.test_cluster_plan:Two", objective="regression")
    arrays = {"wide": np.zeros((6, 256), np.float32), "more": np.zeros((6, 8), np.float32)}
    np.savez(tmp_path / "wide.npz", **arrays, targets=np.full((6, 1), np.nan))
    assert count_work(recipe).flops == 2 * (256 + 8)
    assert sizes_of(recipe, None) == {"fit": 6}


def test_a_step_is_that_of_the_published_figures(tmp_path: Path) -> None:
    case = case_of(tmp_path)
    device, numel = find_device("H100-80GB"), 2 * 256 * 1024
    costs = case.costs(2)
    assert (costs.mesh, costs.actors) == (Mesh(16, 1), 16)
    parts = costs.step_parts(64)
    assert parts["combine"] == pytest.approx(numel * 10 / (BUSY * device.bandwidth))  # int8
    assert parts["wire"] == pytest.approx((12 * 10 * 2 * 16 + 4 * 64) * 8e-9 / 100)
    arithmetic = case.speeds.step.each - STEP * case.work.step_bytes[1] / 2 / device.bandwidth
    assert device.bfloat16 is not None
    assert arithmetic == pytest.approx(STEP * 3 * case.work.flops / device.bfloat16)


def test_actors_that_share_a_device_share_its_speed_and_memory(tmp_path: Path) -> None:
    whole, quarter, two, third = (case_of(tmp_path, actors={"gpus": gpus}) for gpus in (1, 0.25, 2, 0.3))
    assert [case.actors_per_node for case in (whole, quarter, two, third)] == [8, 32, 4, 24]  # Ray splits no actor over GPUs
    assert [case.device_bytes for case in (whole, quarter, two)] == [80e9, 20e9, 80e9]  # an actor computes on one GPU
    assert two.speeds == whole.speeds
    for name in ("combine_s", "project_s"):
        assert getattr(quarter.speeds, name) == pytest.approx(4 * getattr(whole.speeds, name))
    for name in ("step", "forward"):
        slow, fast = getattr(quarter.speeds, name), getattr(whole.speeds, name)
        assert (slow.fixed, slow.each) == pytest.approx((4 * fast.fixed, 4 * fast.each))
        assert slow.least == fast.least


def test_an_actor_that_serves_several_ranks_computes_them_one_after_another(tmp_path: Path) -> None:
    fixed = {"replicas": 32, "shards": 1}
    alone, shared = (case_of(tmp_path, actors=fixed).costs(nodes) for nodes in (4, 1))
    assert (alone.mesh, alone.actors) == (Mesh(32, 1), 32)
    assert (shared.mesh, shared.actors) == (Mesh(32, 1), 8)
    for name, seconds in alone.step_parts(64).items():
        assert shared.step_parts(64)[name] == pytest.approx(seconds * (4 if name in ("combine", "passes", "project") else 1))


def test_shards_and_a_smaller_model_batch_make_a_run_fit_into_memory(tmp_path: Path) -> None:
    learn = {"batch_size": 64, "model_batch": "auto"}
    whole = case_of(tmp_path, learn=learn)
    assert (whole.costs(1).mesh, whole.costs(1).work.model_batch) == (Mesh(8, 1), 20)
    for room, expected in ((20, 20), (19.5, 10), (10, 10), (9.5, 7), (1, 1)):
        memory = (whole.memory(1, Mesh(8, 1)) + whole.load.parameters * (room - 1)) / 0.9
        small = replace(find_device("H100-80GB"), memory=memory)
        case = replace(whole, cluster=Cluster(8, small, 100))
        assert case.costs(1).work.model_batch == expected, room
    tiny = replace(find_device("H100-80GB"), memory=whole.memory(1, Mesh(1, 1)) * 0.999 / 0.9)
    assert replace(whole, cluster=Cluster(8, tiny, 100)).costs(1).mesh.shards > 1


def test_shards_that_do_not_fit_into_a_node_cross_the_network_and_those_that_fit_nowhere_are_refused(tmp_path: Path) -> None:
    case = case_of(tmp_path, actors={"shards": 16})
    with pytest.raises(RecipeError) as caught:
        case.costs(1)
    assert str(caught.value) == (
        "actors.shards is 16, and 1 node of 8 x H100-80GB, 100 Gbit/s can hold 8 actors; expected room for all shards of "
        "a replica. Lower actors.shards, or plan with --nodes 2 or more."
    )
    assert case.costs(2).mesh == Mesh(1, 16)
    assert case.costs(2).speeds.link_s == 8e-9 / 100
    assert case_of(tmp_path, actors={"shards": 8}).costs(2).speeds.link_s == LINK_S
    assert where_scaling_stops(case)[0] >= 2


def test_the_reason_why_scaling_stops_is_what_kept_twice_as_many_nodes_from_half_the_time(tmp_path: Path) -> None:
    case = case_of(tmp_path)
    slow_driver = replace(case, speeds=replace(case.speeds, call_s=3e-3))
    once, learning = (
        [sum(s for part, s in run_seconds(slow_driver.costs(n), 1).items() if (part == "learning") == is_learning)
         for n in (1, 2)] for is_learning in (False, True)
    )  # fmt: skip
    assert once[1] > learning[1]  # most of the time is spent once, but it is not what makes two nodes slower
    assert learning[1] - learning[0] > 10 * (once[1] - once[0]) > 0
    assert where_scaling_stops(slow_driver)[1].startswith("Scaling stops at 1 node: 2 would be only 0.")
    assert "because of the driver (" in where_scaling_stops(slow_driver)[1]
    slow_passes = replace(case, speeds=replace(case.speeds, call_s=0.0, step=Line(0.0, 3e-3)))
    assert "only 1." in where_scaling_stops(slow_passes)[1]
    assert "because of what is done once (" in where_scaling_stops(slow_passes)[1]


def test_scaling_stops_where_twice_as_many_nodes_are_not_worthwhile(tmp_path: Path) -> None:
    for changes in ({}, {"learn": {"batch_size": 4096, "epochs": 500}}, {"actors": {"replicas": 8}}):
        case = case_of(tmp_path, **changes)
        stop, why = where_scaling_stops(case)
        assert case.wall_s(stop) / case.wall_s(2 * stop) < WORTHWHILE
        before = [2**n for n in range(stop.bit_length() - 1)]
        assert all(case.wall_s(n) / case.wall_s(2 * n) >= WORTHWHILE for n in before)
        assert why.startswith(f"Scaling stops at {stop} node")


def test_a_run_costs_the_price_of_its_nodes_for_its_time(tmp_path: Path) -> None:
    found = plan_cluster(recipe_of(tmp_path), NODE, (4, 1), price=36.0, ingredients=20, examples=1000)
    assert [plan["nodes"] for plan in found["plans"]] == [1, 4]
    for plan in found["plans"]:
        assert plan["cost"] == pytest.approx(plan["nodes"] * plan["wall_s"] / 100)
        assert plan["step_s"] == pytest.approx(sum(plan["step_parts_s"].values()))
        assert plan["wall_s"] == pytest.approx(sum(plan["seconds"].values()))
    head, rows = table(found)
    assert head[-1] == "cost"
    assert all(len(row) == len(head) for row in rows)
    assert dict(lines(found))["figures"] == "NVIDIA H100 data sheet (SXM); passes in bfloat16"
    assert closing(found) == [found["why"]]


def test_shapes_plan_what_files_plan(zoo: Path) -> None:
    recipe = make_recipe(values(zoo, actors=AUTO))
    files = plan_cluster(recipe, NODE)
    shapes = plan_cluster(make_recipe(values(zoo, actors=AUTO, ingredients="none/*.pt?K=8")), NODE)
    assert files["ingredients"] == shapes["ingredients"] == 8
    assert files["examples"] == {"fit": 448, "select": 149, "test": 600}
    for name in ("parameters", "blocks", "examples"):
        assert files[name] == shapes[name]
    assert files["plans"][0]["step_s"] == shapes["plans"][0]["step_s"]


@pytest.mark.parametrize(
    ("changes", "stated", "error", "said"),
    [
        ({}, {"examples": 9}, SoupError, "For a plan without checkpoints, state their number as --ingredients N."),
        ({"data": {"fit": "none.npz"}}, {"ingredients": 9}, RecipeError, "the shape of an example is not known"),
        ({"method": "uniform"}, {"ingredients": 9}, RecipeError, "plan: the method uniform learns nothing"),
        ({"actors": {"gpus": 9}}, {"ingredients": 9}, RecipeError, "actors.gpus is 9, and a node has 8 x H100-80GB"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    changes: dict[str, Any], stated: dict[str, int], error: type[SoupError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        plan_cluster(recipe_of(tmp_path, **changes), NODE, **stated)
    assert said in str(caught.value)
    assert not isinstance(caught.value, IngredientError)


def test_the_parts_of_a_step_add_up_by_hand() -> None:
    recipe = make_recipe({"model": WIDE, "data": {"fit": "x.npz"}, "ingredients": "x", "baseline": "none",
                          "learn": {"batch_size": 100, "epochs": 3}})  # fmt: skip
    work = Workload(recipe, 12, 1000, 5, 4, {"fit": 250, "select": 60}, 10**6, has_store=True)
    speeds = Speeds(10, Line(1.0, 0.5), Line(0.0, 0.25), Line(0.0, 0.75), 1e-3, 2e-3, 0.0, 0.0, 0.01, 0.1, 1e-6, 1e-5)
    costs = Costs(work, speeds, Mesh(2, 2), 4)
    assert costs.step_parts(100) == pytest.approx({
        "combine": 500 * 4 * 1e-3,
        "passes": 2 * (1 + 0.5 * 10) + (1 + 0.5 * 5),  # 25 examples of a rank
        "project": 500 * 4 * 2e-3,
        "wire": 2 * 4 * 1000 / 2 * 1e-5 + (12 * 4 * 5 * 4 + 4 * 100) * 1e-6,
        "driver": 0.1 + 4 * 0.01,
    })  # fmt: skip
    many = replace(costs, mesh=Mesh(40, 1), actors=40).step_parts(100)  # three relays, at most 16 ranks each
    assert many["driver"] == pytest.approx(2 * 0.1 + (3 + 16) * 0.01)
    assert many["wire"] == pytest.approx((12 * 4 * 5 * (3 + 16) + 4 * 100) * 1e-6)
    assert (work.turns, work.steps_per_epoch, work.steps) == (3, 3, 27)
    assert run_seconds(costs, 1)["store"] == 0
    steps_s = 2 * costs.step_s(100) + costs.step_s(50)
    learning = 9 * steps_s + (9 + 1 + work.starts) * costs.evaluation_s(60)
    assert run_seconds(costs, 1)["learning"] == pytest.approx(learning)
    assert costs.evaluation_s(60, exact=True) - costs.evaluation_s(60) == pytest.approx(15 * 0.5)  # of a rank
    assert run_seconds(costs, 1)["mixing and evaluation"] == pytest.approx(costs.evaluation_s(60, exact=True))


@pytest.mark.slow
def test_this_machine_is_a_cluster_too(zoo: Path) -> None:
    found = plan_cluster(make_recipe(values(zoo, actors={"cpus": 1})), "2 x CPU", (1, 2))
    assert found["source"] == "measured on this machine"
    assert [plan["actors"] for plan in found["plans"]] == [2, 4]
    assert all(seconds > 0 for plan in found["plans"] for name, seconds in plan["step_parts_s"].items())
    assert torch.get_num_threads() > 0


def test_the_work_of_a_language_model_is_counted_in_the_dtype_of_its_weights(tmp_path: Path) -> None:
    """The same operations, on fewer bytes in bfloat16."""
    spec = saved(llama(), byte_tokenizer(), tmp_path / "m") + "?length=64"
    exact, low = (count_work(make_recipe({"model": spec + more})) for more in ("", "&dtype=bfloat16"))
    assert exact.flops == low.flops > 2 * 64 * (exact.layout.numel - 320 * 32)
    assert low.layout == exact.layout
    for one, other in ((low.saved, exact.saved), (low.step_bytes[0], exact.step_bytes[0])):
        assert 0.3 < one / other < 0.8
