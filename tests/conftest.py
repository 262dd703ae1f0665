"""Fixtures and small tools that the tests share: a zoo of digits, a local Ray, an S3 endpoint, child processes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

SHORT = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # the path of a Ray socket may have 107 bytes
os.environ["RAY_TMPDIR"] = str(SHORT)
os.environ["RAY_SOUP_CACHE"] = str(SHORT / "cache")
os.environ["NUMBA_CACHE_DIR"] = os.environ.get("NUMBA_CACHE_DIR") or str(SHORT / "numba")
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - at the 15 of Ray another test would starve its workers
os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on the CPU
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # with more processes than cores, threads that spin cost ten times the time
ROOT = Path(__file__).parent.parent

# The same examples in every run, however busy the machine is; --hypothesis-profile=other draws others.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("other", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

from ray_soup.actors.in_process import InProcessPool  # noqa: E402
from ray_soup.actors.messages import Mesh, StoreInfo  # noqa: E402
from ray_soup.errors import SoupError  # noqa: E402
from ray_soup.io import storage  # noqa: E402
from ray_soup.io.lease import state_folder  # noqa: E402
from ray_soup.io.progress import no_progress  # noqa: E402
from ray_soup.mixing.blocks import Blocks  # noqa: E402
from ray_soup.recipe import Recipe, make_recipe  # noqa: E402
from ray_soup.soups.inputs import open_inputs  # noqa: E402
from ray_soup.soups.run import run  # noqa: E402
from ray_soup.soups.state import load_state  # noqa: E402
from ray_soup.task.preprocessing import completed  # noqa: E402
from tests import tiny  # noqa: E402
from tests.ports import answers, free_port  # noqa: E402

LONGEST = (
    "ray/test_uris.py", "system/test_chaos.py", "ray/test_search.py", "ray/test_train.py", "system/test_storage.py",
    "ray/test_hosts.py", "system/test_demo.py",
    "system/test_signals.py", "ray/test_learn.py", "ray/test_disk_faults.py", "system/test_jobs.py", "ray/test_any_task.py",
    "ray/test_compare.py", "system/test_fuzz.py", "ray/test_memory.py", "system/test_improvement.py",
    "ray/test_language_models.py", "unit/soups/test_disk_faults.py", "system/test_hub_adapters.py",
    "system/test_pretrainer.py", "ray/test_by_layer.py", "users/test_texts.py", "users/test_images.py",
    "system/test_docs_site.py", "ray/test_adapters.py", "unit/io/test_distributed_runs.py",
)  # fmt: skip
"""Files whose tests take a minute or more, slowest first."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # the order of pytest-xdist: files with few tests last
    assert all((ROOT / "tests" / name).exists() for name in LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left with one of them at the end."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how to repeat the order of the tests if some of them failed: a quiet pytest does not."""
    seed = config.getoption("randomly_seed", None)
    if terminalreporter.stats.get("failed") and seed is not None:
        terminalreporter.write_line(f"Repeat this order with --randomly-seed={seed}")


def pytest_unconfigure() -> None:
    shutil.rmtree(SHORT, ignore_errors=True)


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where `tests.tiny:build` is found, by actors too


def _with_one_thread() -> Iterator[None]:
    """Compute with as many threads as an actor with one CPU does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(_with_one_thread)
one_thread_here = pytest.fixture(scope="module")(_with_one_thread)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with zoo/model_0 ... model_7.safetensors and train, heldout and test .npz."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", 8)
    return folder


@pytest.fixture(scope="session")
def conv_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder like `zoo`, with four ingredients of a model that has BatchNorm layers."""
    folder = tmp_path_factory.mktemp("conv")
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", 4, tiny.build_conv)
    return folder


@pytest.fixture(scope="session")
def cluster(endpoint: dict[str, str]) -> Iterator[None]:
    """Start a local Ray for all tests that need one in this process.

    Its actors return arrays of 1 MB and more to the system at once, so that their memory can be measured, and find s3:// at
    the tests' endpoint.
    """
    from ray_soup.actors.ray_session import connect

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**endpoint, "MALLOC_MMAP_THRESHOLD_": "1000000"}.items():
                patch.setenv(name, value)
            stack.enter_context(connect())
        yield


@pytest.fixture(scope="session")
def soup(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """Learn a mehl+ soup of the zoo; the value is its folder, which tests only read."""
    out = tmp_path_factory.mktemp("soup") / "out"
    run(make_recipe(values(zoo, learn__lr=0.05)), out)
    return out


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start an S3 server; the value is the environment that points s3:// at it."""
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "log"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key-id-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        deadline = time.monotonic() + 180
        while server.poll() is None and time.monotonic() < deadline and not answers(port):
            time.sleep(0.1)
        assert server.poll() is None, log.read_text()
        assert answers(port), log.read_text()
        yield environment
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3(endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Create an empty bucket; the value is its URI."""
    from pyarrow import fs

    for name, value in endpoint.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{time.monotonic_ns()}"
    address = endpoint["AWS_ENDPOINT_URL"].removeprefix("http://")
    fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True).create_dir(bucket)
    return f"s3://{bucket}"


def put(source: Path, uri: str) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            storage.upload(file, f"{uri}/{file.relative_to(source)}")


class InProcess(InProcessPool):
    """Actors in this process, set up for a recipe."""

    def __init__(self, recipe: Recipe, size: int = 1) -> None:
        self.inputs = open_inputs(recipe)
        self.layout = self.inputs.layout
        super().__init__(completed(recipe, self.inputs.adopted), self.inputs.ingredients, Mesh(size, 1), 1)
        self.setup_info = self.setup(no_progress)

    def open_all(self, blocks: Blocks) -> StoreInfo:
        """Open the directions of all ingredients."""
        return self.open_store(self.inputs.everything, blocks, no_progress)


def yield_last(work: Iterator[Any]) -> Any:
    *_, last = work
    return last


PLAIN = {"lr": 0.01, "cosine_lr": True, "average": False, "whiten": 0.0, "screen": False}
"""Settings with which mehl and mehl+ learn by plain projected gradients, which tests of the mechanics check against."""


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe for the zoo in `folder`, with plain settings; `learn__lr=1` changes a key of a section."""
    method = changes.get("method", "mehl+")
    plain = PLAIN if method in ("mehl", "mehl+") else {"average": False}
    recipe: dict[str, Any] = {
        "ingredients": str(folder / "zoo" / "*.safetensors"),
        "model": tiny.SPEC,
        "data": {"fit": str(folder / "heldout.npz"), "select": 0.25, "test": str(folder / "test.npz")},
        "learn": {"batch_size": 61, "epochs": 2, **plain},
        **({"blocks": "tensor"} if method == "mehl+" else {}),
        "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "precision": "float32",
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        value = {**plain, **value} if key == "learn" else value
        recipe[section] = {**recipe.get(section, {}), name: value} if name else value
    return recipe


def ray_soup(*arguments: str) -> list[str]:
    """Return the command line of `ray-soup` for a child process."""
    return [sys.executable, "-m", "ray_soup.cli", *arguments]


def steps_saved(out: Path | str) -> int:
    """Return the steps that a run in progress could resume from: 0 before its first epoch is saved."""
    state = f"{state_folder(str(out))}/learn.pt"
    try:
        return load_state(io.BytesIO(storage.read_bytes(state))).steps
    except (FileNotFoundError, RuntimeError, SoupError):
        return 0  # there is none, or the storage fails just now


def children_called(name: str, pid: int | None = None) -> list[psutil.Process]:
    """Return the running processes below the process `pid`, or below this one, whose title or command contains `name`."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it ends
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a command and everything it started; Ray's own agents would live on for a minute."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=60)
