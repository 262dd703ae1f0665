from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from ray_soup.actors import Actors, quiet, resolve_mesh
from ray_soup.coefficients import load_coefficients
from ray_soup.data import batch_positions, cut
from ray_soup.errors import RecipeError
from ray_soup.learn import State, learn, load_state, model_batches, parametrisation, save_state, summary
from ray_soup.pipeline import prepare, run
from ray_soup.recipe import changed, make_recipe
from ray_soup.shard import Mesh, choose_precision
from tests import tiny
from tests.conftest import ROOT, InProcess, ray_soup, steps_saved, values


def learned(folder: Path, state_file: Path, mesh: Mesh, **changes: Any) -> tuple[np.ndarray, State]:
    """Coefficients float64 [K, B] that a run on this mesh finds."""
    recipe = make_recipe(values(folder, directions={"dtype": "float32"}, **changes))
    ingredients, _ = prepare(recipe)
    actors = Actors(recipe, ingredients, mesh, 2 / mesh.size if mesh.size > 2 else 1)
    try:
        ready = actors.setup(quiet)
        taken = actors.take(tuple(range(len(ingredients))), recipe.blocks, quiet)
        splits = cut(recipe.data, ready.sizes, ready.fit_digests, recipe.learn.seed)
        size = recipe.learn.model_batch if recipe.learn.model_batch != "auto" else len(ingredients)
        state = learn(recipe, actors, taken.norms, splits, size, state_file)
    finally:
        actors.close()
    return parametrisation(recipe.method, taken.norms).coefficients(state.y.numpy()), state


@pytest.mark.usefixtures("cluster")
def test_meshes_agree_and_the_same_mesh_gives_the_same_bits(zoo: Path, tmp_path: Path) -> None:
    """448 fit examples in batches of 61: the last is odd; 4,530 parameters do not divide by the shards."""
    found = {}
    for number, mesh in enumerate((Mesh(1, 1), Mesh(1, 1), Mesh(2, 1), Mesh(1, 2), Mesh(2, 2))):
        file = tmp_path / f"{number}.pt"
        found[number], state = learned(zoo, file, mesh, learn__epochs=3, learn__model_batch=8)
        assert state.steps == 24
        assert state.best_nll < state.curve[0]["select_nll"]
    np.testing.assert_array_equal(found[0], found[1])
    for number in (2, 3, 4):
        assert np.linalg.norm(found[number] - found[0]) <= 1e-4 * np.linalg.norm(found[0])
    assert np.abs(found[0] - 1 / 8).max() > 0.01


@pytest.mark.usefixtures("cluster")
def test_micro_batches_and_model_batches(zoo: Path, tmp_path: Path) -> None:
    whole, _ = learned(zoo, tmp_path / "a.pt", Mesh(1, 1), learn__model_batch=3, method="mehl", blocks="layer")
    micro, state = learned(
        zoo, tmp_path / "b.pt", Mesh(1, 1), learn__model_batch=3, learn__micro_batch=7, method="mehl", blocks="layer"
    )
    assert np.linalg.norm(whole - micro) <= 1e-5 * np.linalg.norm(whole)
    assert state.turn == 3
    assert [c["turn"] for c in state.curve] == [0, 0, 0, 1, 1, 2, 2]
    best = min(c["select_nll"] for c in state.curve)
    assert state.best_nll == best


@pytest.mark.usefixtures("cluster")
def test_the_best_point_on_select_is_kept_not_the_last(zoo: Path, tmp_path: Path) -> None:
    """A learning rate that only does harm: the soup is the uniform one."""
    changes = {"learn__lr": 1e4, "learn__cosine_lr": False, "learn__epochs": 1}
    found, state = learned(zoo, tmp_path / "a.pt", Mesh(1, 1), **changes)
    assert state.curve[-1]["select_nll"] > state.curve[0]["select_nll"]
    np.testing.assert_array_equal(found, 1 / 8)


def test_every_model_comes_once_in_a_models_epoch() -> None:
    turns = model_batches(10, 4, seed=3, models_epochs=2)
    assert [len(t) for t in turns] == [4, 4, 2, 4, 4, 2]
    for turn in (turns[:3], turns[3:]):
        assert sorted(np.concatenate(turn)) == list(range(10))
    assert not np.array_equal(turns[0], turns[3])
    assert all(np.array_equal(a, b) for a, b in zip(turns, model_batches(10, 4, 3, 2), strict=True))


def test_a_state_saved_then_loaded_is_the_same(tmp_path: Path) -> None:
    state = State(torch.randn(3, 2).double(), turn=1, epoch=2, moving=torch.randn(1, 2).double(), step_ms=[1.5])
    save_state(state, tmp_path / "s.pt")
    loaded = load_state(tmp_path / "s.pt")
    assert torch.equal(loaded.y, state.y)
    assert torch.equal(loaded.moving, state.moving)
    assert (loaded.turn, loaded.epoch, loaded.step_ms, loaded.best) == (1, 2, [1.5], None)


class Slower(torch.nn.Module):
    """Takes its time in one precision."""

    def __init__(self, in_bfloat16: bool) -> None:
        super().__init__()
        self.layer, self.in_bfloat16 = torch.nn.Linear(2, 2), in_bfloat16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu") == self.in_bfloat16:
            time.sleep(0.05)
        return self.layer(images)


@pytest.mark.parametrize(("in_bfloat16", "faster"), [(True, "float32"), (False, "bfloat16")])
def test_auto_takes_the_precision_that_is_faster_here(
    monkeypatch: pytest.MonkeyPatch, in_bfloat16: bool, faster: str
) -> None:
    model, images = Slower(in_bfloat16), torch.zeros(3, 2)
    for instructions, asked, found in ((True, "auto", faster), (False, "auto", "float32"), (True, "bfloat16", "bfloat16")):
        monkeypatch.setattr("ray_soup.shard.has_bfloat16", lambda device, has=instructions: has)
        assert choose_precision(make_recipe({"model": tiny.SPEC, "precision": asked}), model, images) == found


def test_a_stopped_run_goes_on_in_its_precision(zoo: Path, tmp_path: Path) -> None:
    """Whatever is faster when it goes on."""
    begun: list[str] = []

    class Choosing(InProcess):
        faster = "bfloat16"

        def choose_precision(self) -> str:
            return self.faster

        def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None:
            begun.append(precision)
            super().begin(chosen, x, precision)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = make_recipe(values(zoo, precision="auto", learn__model_batch=4))
    actors = Choosing(recipe)
    taken = actors.take_all("tensor")
    splits = cut(recipe.data, actors.ready.sizes, actors.ready.fit_digests, 1)
    with pytest.raises(KeyboardInterrupt):
        learn(recipe, actors, taken.norms, splits, 4, tmp_path / "s.pt", after_epoch=stop)
    actors.faster = "float32"
    state = learn(recipe, actors, taken.norms, splits, 4, tmp_path / "s.pt")
    assert begun == ["bfloat16"] * 3
    assert summary(state)["precision"] == "bfloat16"


@pytest.mark.usefixtures("cluster")
def test_a_mesh_that_the_cluster_cannot_place_is_refused(zoo: Path) -> None:
    recipe = make_recipe(values(zoo, actors={"replicas": 50, "shards": 2, "cpus": 1}))
    with pytest.raises(RecipeError, match="50 replicas x 2 shards with 1 CPUs and 0 GPUs each take 100 CPUs"):
        resolve_mesh(recipe, 1000, 8)
    recipe = make_recipe(values(zoo, actors={"gpus": 1}))
    with pytest.raises(RecipeError, match="1 GPUs; the cluster has"):
        resolve_mesh(recipe, 1000, 8)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("mesh", "fault"),
    [
        (Mesh(1, 2), signal.SIGKILL),
        pytest.param(Mesh(2, 1), signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(Mesh(1, 2), signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_actor_is_replaced_and_changes_no_bit(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh, fault: signal.Signals
) -> None:
    undisturbed, _ = learned(zoo, tmp_path / "a.pt", mesh, learn__model_batch=5)
    if fault == signal.SIGSTOP:
        monkeypatch.setattr("ray_soup.actors.DEADLINE_S", 25.0)
    killed: list[int] = []
    step = Actors.step

    def disturbed(self: Actors, *arguments: Any) -> Any:
        disturbed.calls += 1
        if disturbed.calls == 13:  # in the second epoch of the first turn
            mine = psutil.Process().children(recursive=True)
            killed.append(max(p.pid for p in mine if "RemoteShard" in " ".join(p.cmdline())))
            os.kill(killed[0], fault)
        return step(self, *arguments)

    disturbed.calls = 0
    monkeypatch.setattr(Actors, "step", disturbed)
    found, _ = learned(zoo, tmp_path / "b.pt", mesh, learn__model_batch=5)
    assert killed
    np.testing.assert_array_equal(found, undisturbed)


def at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_bits(zoo: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, after at least one was saved; then the same command."""
    recipe = values(zoo, learn__epochs=5, learn__batch_size=8, learn__model_batch=4, actors__replicas=2)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ray_soup("learn", str(tmp_path / "r.yaml"))
    subprocess.run([*command, str(tmp_path / "whole")], check=True, cwd=ROOT, capture_output=True)

    process = subprocess.Popen([*command, str(tmp_path / "cut")], cwd=ROOT, stderr=subprocess.PIPE)
    while not steps_saved(tmp_path / "cut"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    names = {child.pid: child.name() for child in children}
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert steps_saved(tmp_path / "cut") < 10 * 56
    actors = [child for child in children if "Shard" in names[child.pid]]
    assert len(actors) == 2
    deadline = time.monotonic() + 60
    while any(map(at_work, actors)):
        assert time.monotonic() < deadline, "a killed driver left its actors behind"
        time.sleep(0.1)
    for child in filter(at_work, children):  # Ray's own agents take a minute to notice
        child.kill()
    assert not (tmp_path / "cut" / "run.json").exists()

    subprocess.run([*command, str(tmp_path / "cut")], check=True, cwd=ROOT, capture_output=True)
    whole, cut = (load_coefficients(tmp_path / name / "coefficients.safetensors") for name in ("whole", "cut"))
    np.testing.assert_array_equal(whole.values, cut.values)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut")]
    assert records[0]["steps"] == records[1]["steps"] == 10 * 56
    assert records[0]["curve"] == records[1]["curve"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("before", "now"), [((2, 1), (1, 1)), ((1, 1), (1, 2))])
def test_a_stopped_run_goes_on_with_other_actors(
    zoo: Path, tmp_path: Path, before: tuple[int, int], now: tuple[int, int]
) -> None:
    recipe = make_recipe(values(zoo, learn__epochs=4, actors={"replicas": before[0], "shards": before[1], "cpus": 1}))
    whole = run(recipe, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("learning") and steps_saved(tmp_path / "out") and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", stop)
    assert 0 < steps_saved(tmp_path / "out") < whole.record["steps"]
    other = changed(recipe, {"actors.replicas": now[0], "actors.shards": now[1]})
    soup = run(other, tmp_path / "out")
    assert soup.record["mesh"] == {"replicas": now[0], "shards": now[1], "cpus": 1}
    assert soup.record["steps"] == whole.record["steps"]
    ours, theirs = (load_coefficients(s.out / "coefficients.safetensors").values for s in (soup, whole))
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.mark.usefixtures("cluster")
def test_what_a_node_does_not_see_is_named_with_the_node(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "zoo", tmp_path / "zoo")
    recipe = make_recipe(values(zoo, ingredients=str(tmp_path / "zoo")))
    actors = Actors(recipe, prepare(recipe)[0], Mesh(1, 1), 1)
    try:
        (tmp_path / "zoo" / "model_3.safetensors").rename(tmp_path / "model_3")
        with pytest.raises(RecipeError, match=rf"model_3\.safetensors does not exist on the node {socket.gethostname()}"):
            actors.setup(quiet)
        (tmp_path / "model_3").rename(tmp_path / "zoo" / "model_3.safetensors")
        with pytest.raises(RecipeError, match=r"/nothing does not exist on the node .*a shared disk, or a URI"):
            actors.setup(quiet, (str(tmp_path / "nothing"),))
    finally:
        actors.close()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("mesh", [Mesh(2, 1), Mesh(1, 2)])
def test_an_actor_that_dies_while_it_starts_is_made_anew(zoo: Path, mesh: Mesh) -> None:
    import ray

    recipe = make_recipe(values(zoo))
    actors = Actors(recipe, prepare(recipe)[0], mesh, 1)
    killed: list[str] = []

    def kill(what: str, done: int, total: int) -> None:
        if not killed:
            killed.append(what)
            ray.kill(actors._handles[1])

    try:
        assert actors.setup(kill).sizes == {"fit": 597, "test": 600}
        assert killed == ["starting actors"]
        assert len(actors.take(tuple(range(8)), "tensor", quiet).sha256) == 8
    finally:
        actors.close()


def reference_learned_soup(
    folder: Path, plus: bool, batches: list[np.ndarray], lr: float
) -> tuple[list[torch.Tensor], list[float]]:
    """Learned-Soup by autograd over a graph of all ingredients, as Wortsman et al. 2022 describe it: after every step the
    coefficients [K, tensors], and the factor on the logits."""
    states = [load_file(f) for f in sorted((folder / "zoo").glob("*.safetensors"))]
    model = tiny.Tiny().eval()
    names = [name for name, _ in model.named_parameters()]
    stacked = {name: torch.stack([s[name] for s in states]) for name in names}
    raw = torch.zeros(len(states), len(names) if plus else 1, dtype=torch.float64, requires_grad=True)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([raw, factor], lr=lr, weight_decay=0.0)
    images, labels = (torch.from_numpy(a[600:1197]) for a in tiny.digits())
    coefficients, factors = [], []
    for batch in batches:
        c = raw.softmax(0).expand(-1, len(names))
        mixed = {n: torch.einsum("k,k...->...", c[:, i].float(), stacked[n]) for i, n in enumerate(names)}
        logits = torch.func.functional_call(model, mixed, (images[batch],))
        optimizer.zero_grad()
        F.cross_entropy(logits * factor.float(), labels[batch]).backward()
        if plus:  # no gradient but rounding noise, which AdamW would blow up
            raw.grad[:, [names.index("key.bias"), names.index("unused")]] = 0
        optimizer.step()
        coefficients.append(raw.detach().softmax(0).expand(-1, len(names)).clone())
        factors.append(factor.item())
    return coefficients, factors


@pytest.mark.parametrize("method", ["learned", "learned+"])
@pytest.mark.parametrize("size", [1, 2])
def test_learned_soups_are_those_of_autograd_over_all_ingredients(zoo: Path, tmp_path: Path, method: str, size: int) -> None:
    changes = {"learn": {"batch_size": 112, "epochs": 5}, "directions": {"dtype": "float32"}}
    recipe = make_recipe(values(zoo, method=method, **changes))
    assert (recipe.learn.lr, recipe.learn.cosine_lr) == (0.05, False)
    actors = InProcess(recipe, size)
    taken = actors.take_all(recipe.blocks)
    splits = cut(recipe.data, actors.ready.sizes, actors.ready.fit_digests, recipe.learn.seed)
    state = learn(recipe, actors, taken.norms, splits, 8, tmp_path / "s.pt")
    assert state.steps == 20
    order = [batch_positions(448, 112, recipe.learn.seed, 2, 0, epoch) for epoch in range(5)]
    batches = [splits["fit"].rows[positions] for epoch in order for positions in epoch]
    coefficients, factors = reference_learned_soup(zoo, method == "learned+", batches, recipe.learn.lr)
    kept = min(state.curve, key=lambda line: line["select_nll"])["steps"]
    assert kept > 0
    found = parametrisation(method, taken.norms).coefficients(state.y.numpy())
    blocks = taken.partition.block
    wide = np.stack([found[:, b] if b >= 0 else np.full(8, 1 / 8) for b in blocks], axis=1)
    expected = coefficients[kept - 1].numpy()
    if method == "learned":
        wide, expected = found, expected[:, :1]
    assert np.linalg.norm(wide - expected) <= 1e-4 * np.linalg.norm(expected)
    assert abs(state.factor.item() - factors[kept - 1]) <= 1e-4 * factors[kept - 1]
    assert abs(state.factor.item() - 1) > 0.01
    assert np.abs(found - 1 / 8).max() > 0.01
