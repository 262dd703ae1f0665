"""The files of a model written by several actors, compared with those written by one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh, ModelFiles
from ray_soup.actors.on_ray import BakingPool
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.progress import drain, no_count, no_progress
from ray_soup.mixing.bake import bake, plan_baking, read_bytes
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.baking import all_of, bake_whole
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.mixture import mean_coefficients
from ray_soup.soups.output import open_output
from ray_soup.soups.records import check_files, finished_record
from tests.conftest import values

SHARD = 400
"""Bytes of tensors in a file: the model has several."""


class Soup:
    """A soup of a zoo with BatchNorm layers, whose model was written by one process in `folder`."""

    def __init__(self, zoo: Path, folder: Path) -> None:
        self.zoo, self.folder = zoo, folder
        self.recipe = make_recipe(values(zoo, model="tests.tiny:build_conv", shard_size=SHARD))
        self.inputs = open_inputs(self.recipe)
        self.ingredients: list[Ingredient] = list(self.inputs.ingredients)
        self.coefficients: Coefficients = mean_coefficients(self.recipe, self.inputs, [0, 2, 3])
        self.index = bake(self.coefficients, self.ingredients, folder / "model.safetensors", shard_size=SHARD)

    def write(self, pool: InProcessPool | BakingPool, folder: Path, told: Callable[[int], None] = lambda _: None) -> None:
        """Let a pool write the model into `folder`, and check that it is the same as the one of one process."""
        files = plan_baking(self.coefficients, self.ingredients, folder / "model.safetensors", "keep", SHARD)
        subset = tuple(range(len(self.ingredients)))
        read = pool.bake(ModelFiles(subset, self.coefficients, str(files.path), "keep", SHARD), files, told)
        files.write_index()
        assert read >= read_bytes(self.coefficients, self.ingredients, files)
        assert contents(folder) == contents(self.folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def soup(conv_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Soup:
    made = Soup(conv_zoo, tmp_path_factory.mktemp("one process"))
    assert len(contents(made.folder)) > 3
    return made


@pytest.fixture
def local(soup: Soup) -> Iterator[InProcessPool]:
    """Two shards in this process."""
    pool = InProcessPool(soup.recipe, soup.ingredients, Mesh(2, 1), 1)
    pool.setup(no_progress)
    yield pool
    pool.close()


@pytest.fixture
def bakers(soup: Soup, cluster: None) -> Iterator[BakingPool]:
    pool = BakingPool(soup.recipe, soup.ingredients)
    pool.setup(no_progress)
    yield pool
    pool.close()


def test_every_byte_is_read_once(soup: Soup, local: InProcessPool, tmp_path: Path) -> None:
    told: list[int] = []
    soup.write(local, tmp_path, told.append)
    files = plan_baking(soup.coefficients, soup.ingredients, tmp_path / "model.safetensors", "keep", SHARD)
    assert told[-1] == read_bytes(soup.coefficients, soup.ingredients, files)
    assert told == sorted(told)


def test_an_actor_that_is_lost_writes_its_files_again(soup: Soup, local: InProcessPool, tmp_path: Path) -> None:
    def lose(read: int) -> None:
        if read and not killed:
            killed.append(read)
            local.handles[1].kill()

    killed: list[int] = []
    soup.write(local, tmp_path, lose)
    assert killed


def test_actors_upload_the_files_of_a_model_in_remote_storage(
    soup: Soup, local: InProcessPool, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go into OUT without passing through the driver, which only has their headers."""
    monkeypatch.setattr(InProcessPool, "nodes", 2)
    with open_output(f"{s3}/out") as output:
        staging = output.staging()
        writers = all_of(local, soup.ingredients, output)
        path = staging / "model.safetensors"
        index = bake_whole(soup.recipe, soup.coefficients, soup.ingredients, path, no_count, SHARD, writers)
        assert open_ingredient(str(staging)).tensors == open_ingredient(str(soup.folder)).tensors
        assert sum(file.stat().st_blocks for file in staging.glob("*.safetensors")) < len(contents(soup.folder)) * 16
        there = output.visible_to_actors(index).removesuffix(f"/{index.name}")
        for name, data in contents(soup.folder).items():
            assert storage.read_bytes(f"{there}/{name}") == data
        output.publish(soup.recipe, [], {"exit": 0, "ingredients": []}, staging)
    found = Path(drain(storage.local_copy(f"{s3}/out")))
    assert {file.name: file.read_bytes() for file in found.glob("model*")} == contents(soup.folder)
    record = finished_record(found)
    check_files(found, record)
    assert contents(soup.folder).keys() < record["files"].keys()
    assert not [name for name in storage.walk(f"{s3}/out/state") if name.startswith(("out/", "evaluated/"))]


@pytest.mark.slow
def test_actors_of_ray_write_and_hash(soup: Soup, bakers: BakingPool, tmp_path: Path) -> None:
    import ray

    soup.write(bakers, tmp_path)
    assert bakers.hash(no_progress) == hash_ingredients(soup.ingredients)
    ray.kill(bakers.handles[0])
    for file in tmp_path.iterdir():
        file.write_bytes(b"of a lost actor")
    soup.write(bakers, tmp_path)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_output_folder_stops_the_start(soup: Soup, bakers: BakingPool, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"elsewhere does not exist on the node .* a shared disk"):
        bakers.setup(no_progress, (str(tmp_path / "elsewhere"),))


def test_files_that_the_driver_does_not_see_are_an_error(
    soup: Soup, local: InProcessPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that each node has for itself."""
    files = plan_baking(soup.coefficients, soup.ingredients, tmp_path / "model.safetensors", "keep", SHARD)

    def lose(read: int) -> None:
        for file in list(files.files)[-1:]:
            file.unlink(missing_ok=True)

    with pytest.raises(SoupError, match=r"model-0000\d-of-0000\d\.safetensors is missing, although an actor has written it"):
        local.bake(ModelFiles((0, 1, 2, 3), soup.coefficients, str(files.path), "keep", SHARD), files, lose)


def test_a_changed_ingredient_is_found_by_the_actor_that_reads_it(conv_zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(conv_zoo, tmp_path / "copy")
    (tmp_path / "one").mkdir()
    soup = Soup(tmp_path / "copy", tmp_path / "one")
    pool = InProcessPool(soup.recipe, soup.ingredients, Mesh(2, 1), 1)
    pool.setup(no_progress)
    broken = tmp_path / "copy" / "zoo" / "model_2.safetensors"
    data = np.frombuffer(broken.read_bytes(), np.uint8).copy()
    data[-1] ^= 1
    broken.write_bytes(data.tobytes())
    with pytest.raises(SoupError, match=r"model_2\.safetensors changed while it was in use"):
        soup.write(pool, tmp_path)
    assert not list(tmp_path.glob("model*"))
