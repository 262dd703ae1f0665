"""One contract for every pool of actors: the same answers, order, errors and recovery on Ray and in this process."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_soup.actors import relays
from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.mesh_pool import MeshPool
from ray_soup.actors.messages import Mesh, SetupInfo
from ray_soup.actors.on_ray import RayPool
from ray_soup.actors.teams import ATTEMPTS, Team
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.progress import no_progress
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.data import Split
from tests import tiny
from tests.conftest import values

INGREDIENTS = 4
EVERYTHING = tuple(range(INGREDIENTS))
CHOSEN = np.array([0, 2])
FIT = Split("fit", np.arange(149, dtype=np.int32))  # does not divide by two actors
TEST = Split("test", np.arange(100, dtype=np.int32))
BATCHES = [Split("fit", np.arange(64 * n, 64 * (n + 1), dtype=np.int32)) for n in range(3)]
Pools = Callable[..., MeshPool]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe for a zoo with BatchNorm layers, so that every call has something to do."""
    folder = tmp_path_factory.mktemp("conv")
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", INGREDIENTS, tiny.build_conv)
    return make_recipe(values(folder, model="tests.tiny:build_conv", learn__micro_batch=16))


@pytest.fixture(scope="module")
def paths(recipe: Recipe) -> list[str]:
    return [ingredient.path for ingredient in open_inputs(recipe).ingredients]


@pytest.fixture(scope="module", params=["in_process", "on_ray"])
def pools(request: pytest.FixtureRequest, recipe: Recipe, one_thread_here: None) -> Iterator[Pools]:
    """Create pools of one kind that are not set up."""
    on_ray = request.param == "on_ray"
    if on_ray:
        request.getfixturevalue("cluster")
    with _pools(recipe, on_ray) as create:
        yield create


class _pools:
    """Pools of one kind, closed at the end. On Ray an actor takes no CPU, so that several pools fit on any machine."""

    def __init__(self, recipe: Recipe, on_ray: bool) -> None:
        self.recipe, self.on_ray, self.open = recipe, on_ray, []

    def __enter__(self) -> Pools:
        return self.create

    def create(self, size: int = 2, **changes: Any) -> MeshPool:
        recipe = self.recipe.model_copy(update=changes)
        ingredients, mesh = open_inputs(recipe).ingredients, Mesh(size, 1)
        pool = RayPool(recipe, ingredients, mesh, 0) if self.on_ray else InProcessPool(recipe, ingredients, mesh, 1)
        self.open.append(pool)
        return pool

    def __exit__(self, *_: object) -> None:
        for pool in self.open:
            pool.close()


@pytest.fixture(scope="module")
def shared(pools: Pools) -> tuple[MeshPool, SetupInfo]:
    pool = pools()
    return pool, pool.setup(no_progress)


@pytest.fixture
def pool(shared: tuple[MeshPool, SetupInfo]) -> MeshPool:
    """Two actors that have opened all directions and begun a model batch."""
    pool, _ = shared
    blocks = pool.open_store(EVERYTHING, "tensor", no_progress).partition.count
    pool.begin(CHOSEN, coordinates(INGREDIENTS, blocks), "float32")
    return pool


@pytest.fixture(scope="module")
def reference(recipe: Recipe) -> Iterator[InProcessPool]:
    """The pool that all others are compared with; set up."""
    with _pools(recipe, on_ray=False) as create:
        pool = create()
        pool.setup(no_progress)
        yield pool


def coordinates(count: int, blocks: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal((count, blocks))).astype(np.float32)


def lose(pool: MeshPool, actor: Any) -> None:
    """Kill an actor behind the pool's back, and wait until it no longer answers."""
    if isinstance(pool, InProcessPool):
        actor.kill()
        return
    import ray
    from ray.exceptions import RayActorError

    ray.kill(actor)
    with suppress(RayActorError):
        while True:
            ray.get(actor.reset_peak.remote())


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare answers bit for bit; times may differ."""
    assert type(found) is type(expected), where
    if dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            if field.name not in ("seconds", "combine_s", "project_s", "node_id"):
                assert_same(getattr(found, field.name), getattr(expected, field.name), f"{where}.{field.name}")
    elif isinstance(found, np.ndarray):
        assert found.dtype == expected.dtype, where
        np.testing.assert_array_equal(found, expected, where)
    elif isinstance(found, dict):
        assert_same(list(found.items()), list(expected.items()), where)
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), where
        for n, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{n}]")
    else:
        assert found == expected, where


def answers(pool: MeshPool, paths: list[str]) -> dict[str, Any]:
    """What a pool answers to every call whose answer is not a measurement."""
    found: dict[str, Any] = {"open_store": pool.open_store(EVERYTHING, "tensor", no_progress)}
    blocks = found["open_store"].partition.count
    x = coordinates(INGREDIENTS, blocks)
    found["precision"] = pool.choose_precision()
    pool.begin(CHOSEN, x, "float32")
    found["step"] = pool.step(x[CHOSEN], 1.5, FIT)
    found["statistics"] = pool.recalibrate(x[CHOSEN], BATCHES)
    found["recalibrated step"] = pool.step(x[CHOSEN], 1.5, FIT)
    found["evaluate"] = pool.evaluate(x[CHOSEN], 1.5, TEST)
    found["evaluate_each"] = pool.evaluate_each(x[CHOSEN], TEST)
    assert found["evaluate_each"].nll == pytest.approx(pool.evaluate(x[CHOSEN], 1.0, TEST).nll, rel=1e-5)
    pool.use({})
    found["evaluate with averaged buffers"] = pool.evaluate(x[CHOSEN], 1.5, TEST)
    found["gram"] = pool.gram()
    found["gram_of_blocks"] = pool.gram_of_blocks()
    found["statistics_of_file"] = pool.statistics_of_file(paths[1], BATCHES)
    found["evaluate_file"] = pool.evaluate_file(paths[0], [FIT, TEST])
    found["evaluate_files"] = list(pool.evaluate_files(paths[:3], [FIT, TEST]))
    found["evaluate_member"] = [pool.evaluate_member(tuple(paths[: n + 1]), [FIT, TEST]) for n in range(2)]
    found["evaluate_ensemble"] = pool.evaluate_ensemble(tuple(paths[:2]), [FIT, TEST])
    found["try_candidate"] = [pool.try_candidate((3,), 1, [FIT, TEST]), pool.try_candidate((3, 1), 0, [FIT], BATCHES)]
    found["try_mixture"] = [pool.try_mixture(np.array([0.5, 0, 0.75, -0.25]), [FIT, TEST], some) for some in ([], BATCHES)]
    pool.forget()
    return found


@pytest.fixture(scope="module")
def expected(reference: InProcessPool, paths: list[str]) -> dict[str, Any]:
    return answers(reference, paths)


# Answers


def test_every_answer_is_the_same_bit_for_bit(pool: MeshPool, paths: list[str], expected: dict[str, Any]) -> None:
    assert_same(answers(pool, paths), expected)
    assert expected["step"][0].gradient.any()
    assert expected["statistics"]


def test_setup_reports_the_same(shared: tuple[MeshPool, SetupInfo], reference: InProcessPool) -> None:
    assert_same(shared[1], reference.setup(no_progress))


def test_partial_gradients_come_in_the_order_of_ranks(pool: MeshPool, recipe: Recipe) -> None:
    """Each is the answer of one actor alone to that part of the batch."""
    with _pools(recipe, on_ray=False) as create:
        alone = create(size=1)
        alone.setup(no_progress)
        blocks = alone.open_store(EVERYTHING, "tensor", no_progress).partition.count
        x = coordinates(INGREDIENTS, blocks)
        alone.begin(CHOSEN, x, "float32")
        expected = [alone.step(x[CHOSEN], 1.0, part)[0] for part in FIT.parts(2)]
    assert_same(pool.step(x[CHOSEN], 1.0, FIT), expected)


def test_checkpoints_spread_over_the_actors_come_in_order(pool: MeshPool, paths: list[str]) -> None:
    """Three checkpoints on two actors: the same outcomes as with the examples spread over the actors."""
    found = list(pool.evaluate_files(paths[:3], [TEST]))
    assert len(found) == 3
    for path, (outcome,) in zip(paths, found, strict=False):
        (split,) = pool.evaluate_file(path, [TEST])
        np.testing.assert_array_equal(outcome.correct, split.correct)
        np.testing.assert_allclose(outcome.loss, split.loss, rtol=1e-4, atol=1e-6)
        assert outcome.factored is None
        assert split.factored is not None


def test_actors_that_share_work_report_its_sum(pool: MeshPool, paths: list[str]) -> None:
    heard: list[tuple[str, int, int]] = []
    pool.evaluate_file(paths[0], [FIT], lambda *heartbeat: heard.append(heartbeat))
    assert {what for what, _, _ in heard} == {"evaluating"}
    assert heard[-1][1:] == (149, 149)
    assert {heard[0][1:]} <= {(74, 149), (75, 149)}


def with_all_actors(pool: MeshPool) -> MeshPool:
    """Return a pool once each replica has an actor of its own: one that replaces another starts in the background."""
    until = time.monotonic() + 240
    while pool.counts.actors < pool.mesh.size:
        assert time.monotonic() < until
        pool.forget()
        time.sleep(0.1)
    return pool


@pytest.mark.slow
def test_measurements_have_a_figure_for_each_actor(pool: MeshPool) -> None:
    with_all_actors(pool).reset_peak()
    assert all(nbytes > 10_000_000 for nbytes in pool.peak_memory())
    assert len(pool.peak_memory()) == 2
    timings = pool.time_step(4, 8, no_progress)
    assert timings.images == 8
    assert all(value > 0 for value in dataclasses.asdict(timings).values())


# Errors

Wrong = Callable[[MeshPool, list[str], Path], Any]
NOWHERE = Split("nowhere", np.arange(4, dtype=np.int32))
ONE_IMAGE = Split("fit", np.arange(1, dtype=np.int32))
WRONG: dict[str, tuple[type[Exception], Wrong]] = {
    "blocks of an unknown kind": (
        RecipeError,
        lambda pool, paths, folder: pool.open_store(EVERYTHING, "rows", no_progress),
    ),
    "a file that is no checkpoint": (
        IngredientError,
        lambda pool, paths, folder: pool.evaluate_file(str(folder / "text.safetensors"), [FIT]),
    ),
    "too few images": (
        RecipeError,
        lambda pool, paths, folder: pool.statistics_of_file(paths[0], [ONE_IMAGE, ONE_IMAGE]),
    ),
    "an unknown ingredient": (IndexError, lambda pool, paths, folder: pool.try_candidate((0,), 99, [FIT])),
    "an unknown source": (KeyError, lambda pool, paths, folder: pool.evaluate_file(paths[0], [NOWHERE])),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_raises_the_same_error_and_is_not_retried(
    pool: MeshPool, reference: InProcessPool, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    kind, call = WRONG[wrong]
    (tmp_path / "text.safetensors").write_bytes(b"no tensors in here")
    with pytest.raises(kind) as expected:
        call(reference, paths, tmp_path)
    attempts: list[int] = []
    collect = with_all_actors(pool)._collect

    def counted(calls: dict[int, Any], *more: Any, **options: Any) -> Any:
        attempts.append(len(calls))
        return collect(calls, *more, **options)

    handles = list(pool.handles)
    monkeypatch.setattr(pool, "_collect", counted)
    with pytest.raises(kind) as found:
        call(pool, paths, tmp_path)
    assert type(found.value) is type(expected.value)
    assert str(found.value) == str(expected.value)
    assert len(attempts) == 1
    assert all(now is before for now, before in zip(pool.handles, handles, strict=True))


def test_a_file_that_a_node_does_not_see_stops_the_start(pools: Pools, tmp_path: Path) -> None:
    pool = pools()
    with pytest.raises(RecipeError, match=r"nothing\.txt does not exist on the node .*a shared disk, or a URI"):
        pool.setup(no_progress, (str(tmp_path / "nothing.txt"),))


def test_a_metric_that_fails_stops_the_start(pools: Pools) -> None:
    with pytest.raises(RecipeError, match=r"metric: tests\.tiny:digits has the signature"):
        pools(metric="tests.tiny:digits").setup(no_progress)


# Recovery


def test_a_lost_actor_is_replaced_and_the_next_step_is_bit_identical(pool: MeshPool, reference: InProcessPool) -> None:
    """With directions, a model batch and running statistics to be restored."""
    blocks = reference.open_store(EVERYTHING, "tensor", no_progress).partition.count
    x = coordinates(INGREDIENTS, blocks)
    reference.begin(CHOSEN, x, "float32")
    statistics = reference.recalibrate(x[CHOSEN], BATCHES)
    expected = reference.step(x[CHOSEN], 1.0, FIT)
    pool.use(statistics)
    assert_same(pool.step(x[CHOSEN], 1.0, FIT), expected)
    before = list(with_all_actors(pool).handles)
    lose(pool, pool.handles[1])
    assert_same(pool.step(x[CHOSEN], 1.0, FIT), expected)
    assert pool.handles[0] is before[0]
    assert pool.handles[1] is not before[1]
    for actor in set(pool.handles):
        lose(pool, actor)
    assert_same(pool.step(x[CHOSEN], 1.0, FIT), expected)


@pytest.mark.slow
def test_every_call_survives_the_loss_of_an_actor(pool: MeshPool, paths: list[str], expected: dict[str, Any]) -> None:
    """Before each call another actor is killed; on Ray, where a new one takes seconds, before every fourth call."""
    calls = 0
    every = 1 if isinstance(pool, InProcessPool) else 4
    ask = pool._ask

    def losing(*arguments: Any, **options: Any) -> list[Any]:
        nonlocal calls
        if calls % every == 0:
            lose(pool, pool.handles[calls // every % 2])
        calls += 1
        return ask(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_ask", losing)
        found = answers(pool, paths)
    assert calls >= 17
    assert_same(found, expected)


def test_an_actor_that_is_lost_during_a_stream_is_replaced(
    pool: MeshPool, paths: list[str], expected: dict[str, Any]
) -> None:
    before = list(pool.handles)

    def kill(*_: object) -> None:
        if pool.handles[1] is before[1]:
            lose(pool, pool.handles[1])

    assert_same(pool.evaluate_file(paths[0], [FIT, TEST], kill), expected["evaluate_file"])


def test_an_actor_that_is_lost_while_it_starts_is_re_created(pools: Pools, reference: InProcessPool) -> None:
    pool, killed = pools(), list[str]()

    def kill(what: str, done: int, total: int) -> None:
        if not killed:
            killed.append(what)
            lose(pool, pool.handles[1])

    assert_same(pool.setup(kill), reference.setup(no_progress))
    assert killed == ["starting actors"]
    assert len(pool.open_store(EVERYTHING, "tensor", no_progress).sha256) == INGREDIENTS


@pytest.mark.slow
def test_an_actor_that_is_lost_while_it_is_restored_is_restored_again(
    pool: MeshPool, reference: InProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both actors are lost; one of the new ones is lost before it is set up, the other is set up but not up to date."""
    blocks = reference.open_store(EVERYTHING, "tensor", no_progress).partition.count
    x = coordinates(INGREDIENTS, blocks)
    reference.begin(CHOSEN, x, "float32")
    expected = reference.step(x[CHOSEN], 1.0, FIT)
    created: list[int] = []
    create = pool._create

    def create_and_lose(team: Team) -> None:
        create(team)
        if not created:
            lose(pool, team.actors[0])
        created.append(team.number)

    both = set(with_all_actors(pool).handles)  # one that was created before would join later
    monkeypatch.setattr(pool, "_create", create_and_lose)
    for actor in both:
        lose(pool, actor)
    assert_same(pool.step(x[CHOSEN], 1.0, FIT), expected)
    assert_same(with_all_actors(pool).step(x[CHOSEN], 1.0, FIT), expected)
    assert len(created) >= 3


def test_a_pool_that_keeps_losing_actors_gives_up_and_says_how_to_resume(
    pool: MeshPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, attempts = pool._create, list[int]()

    def create_and_lose(team: Team) -> None:
        create(team)
        attempts.append(team.number)
        lose(pool, team.actors[0])

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_create", create_and_lose)
        for team in pool._teams:  # also those that replace the actors of an earlier test
            lose(pool, team.actors[0])
        with pytest.raises(SoupError) as found:
            pool.reset_peak()
    assert ATTEMPTS <= len(attempts) <= ATTEMPTS * pool.mesh.size + 2
    message = (
        r"The actors could not be started: gave up after 5 attempts \(lost actor \d+ on no node yet while it started: "
        r".*\)\. Rerun the same command to resume\."
    )
    assert re.fullmatch(message, str(found.value))
    pool.setup(no_progress)
    assert len(pool.peak_memory()) == 2  # it can be used again once actors live


@pytest.mark.slow
def test_the_answers_do_not_depend_on_the_number_of_actors(
    pools: Pools, recipe: Recipe, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks on four actors, then on one, then on two: the same bits."""
    with _pools(recipe, on_ray=False) as create:
        four = create(size=4)
        four.setup(no_progress)
        expected = answers(four, paths)
    pool, told = pools(size=4), list[str]()
    monkeypatch.setattr(pool, "_room_for", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_missing", lambda: 0)
        pool.setup(lambda what, done, total: told.append(what))
        assert len(set(pool.handles)) == pool.counts.actors == len(pool.peak_memory()) == 1
        assert_same(answers(pool, paths), expected)
    assert [what for what in told if what.startswith("note: ")] == [
        "note: 1 actor serves all 4 replicas, one after another: the cluster has no room for 3 more now. They start when it "
        "has; the result does not change."
    ]
    x = coordinates(INGREDIENTS, expected["open_store"].partition.count)
    pool.open_store(EVERYTHING, "tensor", no_progress)
    pool.begin(CHOSEN, x, "float32")
    deadline = time.monotonic() + 240
    while pool.counts.actors < 4:
        assert_same(pool.step(x[CHOSEN], 1.5, FIT), expected["step"])
        assert time.monotonic() < deadline
    assert (pool.counts.created, pool.counts.lost) == (3, 0)
    assert_same(pool.step(x[CHOSEN], 1.5, FIT), expected["step"])
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_missing", lambda: 0)
        for rank in (3, 0):
            lose(pool, pool.handles[rank])
        assert_same(pool.step(x[CHOSEN], 1.5, FIT), expected["step"])
        assert_same(answers(pool, paths), expected)
    assert (pool.counts.actors, pool.counts.lost) == (2, 2)


@pytest.mark.slow
def test_relays_change_no_bit_and_may_be_lost_with_or_without_actors(
    recipe: Recipe, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 ranks on two actors: called directly, through relays, and while either or both are killed, or an actor hangs."""
    import ray
    from ray.exceptions import RayActorError

    with _pools(recipe, on_ray=False) as here, _pools(recipe, on_ray=True) as there:
        one, pool, told = here(size=32), there(size=32), list[str]()
        for some, count in ((one, 1), (pool, 2)):
            monkeypatch.setattr(some, "_room_for", lambda count=count: count)
            monkeypatch.setattr(some, "_missing", lambda some=some, count=count: count - len(some._teams))
            some.setup(lambda what, done, total: told.append(what))
            x = coordinates(INGREDIENTS, some.open_store(EVERYTHING, "tensor", no_progress).partition.count)
            some.begin(CHOSEN, x, "float32")
        expected = one.step(x[CHOSEN], 1.5, FIT)
        assert len(expected) == 2
        direct, in_turns = list[int](), pool._in_turns

        def counted(ranks: Any, *more: Any) -> Any:
            direct.append(len(ranks))
            return in_turns(ranks, *more)

        def step(*calls: int) -> None:
            """Take a step; `calls` are the numbers of direct ones."""
            direct.clear()
            assert_same(pool.step(x[CHOSEN], 1.5, FIT), expected)
            assert [count for count in direct if count] == list(calls)

        def kill_relay(number: int) -> None:
            relay = pool._relays.known[number].handle
            ray.kill(relay)
            with suppress(RayActorError):
                while True:
                    ray.get(relay.serve.remote([], [], 0.0))

        def with_relays() -> None:
            until = time.monotonic() + 240
            while pool._relays.started < 2 or pool.counts.actors < 2:
                assert time.monotonic() < until
                assert_same(pool.step(x[CHOSEN], 1.5, FIT), expected)
            step()

        monkeypatch.setattr(pool, "_in_turns", counted)
        monkeypatch.setattr(relays, "AGAIN_S", 0.0)
        step(32)  # the relays have not started
        with_relays()
        with pytest.raises(KeyError, match="nowhere"):
            pool.step(x[CHOSEN], 1.5, NOWHERE)
        step()
        kill_relay(1)
        step(16)
        with_relays()
        lose(pool, pool.handles[31])
        step()  # the other actor serves all 32, through relays
        with_relays()
        lose(pool, pool.handles[0])
        kill_relay(0)
        step(16, 16)  # ranks without a relay, on the lost actor and then on the other one
        assert pool.counts.lost == 2
        with_relays()
        monkeypatch.setenv("RAY_SOUP_DEADLINE_S", "15")
        pool._relays.actors = []  # a relay learns the deadline with its actors
        process = ray.get(pool.handles[31].__ray_call__.remote(lambda actor: os.getpid()))
        os.kill(process, signal.SIGSTOP)
        step()
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        assert pool.counts.lost == 3
        assert "(no answer within 15 s)" in [what for what in told if "Lost" in what][-1]


def test_a_replica_in_one_process_has_one_shard(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="2 shards"):
        InProcessPool(recipe, open_inputs(recipe).ingredients, Mesh(1, 2), 1)
