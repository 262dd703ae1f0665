"""A model whose parameters are there one layer at a time, compared with the same model held whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_soup.errors import RecipeError
from ray_soup.io.progress import no_progress
from ray_soup.mixing.blocks import Blocks
from ray_soup.recipe import dump_recipe, make_recipe
from ray_soup.task.data import Split
from tests.conftest import ROOT, InProcess
from tests.conftest import values as values_of
from tests.unit.task.language_models import byte_tokenizer, saved

COUNT = 5
FIT = Split("fit", np.arange(61, dtype=np.int32))
EVERYTHING = tuple(range(COUNT))


class Layer(nn.Module):
    def __init__(self, width: int, shared: nn.Parameter) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, 2 * width), nn.BatchNorm1d(width), nn.Linear(2 * width, width)
        self.shared = shared
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.nn.functional.gelu(self.first(self.norm(x) * self.shared)))


class Deep(nn.Module):
    """Four layers, the first of which runs twice; they share a parameter, and the head shares one with the first layer."""

    def __init__(self, width: int = 12, leaks: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        shared = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleList([Layer(width, shared) for _ in range(4)])
        self.last = nn.Linear(width, width, bias=False)
        self.layers[0].own = self.last
        self.leaks = leaks

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images.float().flatten(1) / 8 - 1)
        for layer in (self.layers[0], *self.layers):
            x = layer(x)
        if self.leaks:
            x = x * self.layers[2].first.weight.sum()
        return self.head(torch.tanh(self.last(x)))


def build() -> nn.Module:
    return Deep()


def build_leaking() -> nn.Module:
    return Deep(leaks=True)


@pytest.fixture(scope="module")
def deep(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `zoo`, and five random models near each other in float32."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "zoo").mkdir()
    for name in ("train", "heldout", "test"):
        (folder / f"{name}.npz").write_bytes((zoo / f"{name}.npz").read_bytes())
    torch.manual_seed(1)
    start = Deep().state_dict()
    for k in range(COUNT):
        torch.manual_seed(k)
        state = {
            n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() and "var" not in n else t for n, t in start.items()
        }
        state = {n: t for n, t in state.items() if not n.endswith(".own.weight") and not (".shared" in n and "0" not in n)}
        save_file(state, folder / "zoo" / f"model_{k}.safetensors")
    return folder


def pool_of(folder: Path, by_layer: bool, **changes: Any) -> InProcess:
    actors = {"replicas": 1, "shards": 1, "cpus": 1, "by_layer": by_layer}
    model = "tests.unit.actors.test_by_layer:build"
    return InProcess(make_recipe(values_of(folder, model=model, learn__micro_batch=16, actors=actors, **changes)))


def coordinates(blocks: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal((COUNT, blocks))).astype(np.float32)


@pytest.mark.parametrize(
    ("blocks", "dtype"),
    [*((blocks, "int8") for blocks in ("tensor", "layer", "model", 300, {"tensor": 5})), ({"tensor": 5}, "int4")],
)
@pytest.mark.parametrize("chosen", [EVERYTHING, (1, 4), (3,)])
def test_loss_and_gradient_are_those_of_the_whole_model(
    deep: Path, blocks: Blocks, dtype: str, chosen: tuple[int, ...]
) -> None:
    found = []
    for by_layer in (False, True):
        pool = pool_of(deep, by_layer, directions__dtype=dtype)
        x = coordinates(pool.open_all(blocks).partition.count)
        pool.begin(np.array(chosen), x, "float32")
        for _ in range(2):  # the second step begins with no gradient of the first
            (part,) = pool.step(x[list(chosen)], 1.5, FIT)
        found.append(part)
    whole, layered = found
    assert layered.loss == whole.loss
    assert layered.by_factor == pytest.approx(whole.by_factor, rel=1e-6)
    assert np.abs(whole.gradient).min(axis=1).max() >= 0
    scale = np.abs(whole.gradient).max()
    np.testing.assert_allclose(layered.gradient, whole.gradient, atol=1e-6 * scale)


def test_every_evaluation_has_the_same_bits(deep: Path) -> None:
    """Also between steps, where the parameters come from elsewhere."""
    answers = []
    for by_layer in (False, True):
        pool = pool_of(deep, by_layer)
        x = coordinates(pool.open_all("tensor").partition.count)
        pool.begin(np.arange(COUNT), x, "float32")
        file = str(deep / "zoo" / "model_2.safetensors")
        answers.append(
            [
                pool.evaluate(x, 1.0, FIT),
                pool.evaluate_file(file, [FIT])[0].loss.tolist(),
                pool.evaluate(x, 1.0, FIT),
                pool.try_candidate((0, 3), 1, [FIT]),
                pool.try_candidate((0, 3, 1), 4, [FIT], [FIT]),
                pool.try_mixture(np.array([0.5, 0.0, 0.75, -0.25, 0.0]), [FIT]),
                pool.evaluate_ensemble((file, str(deep / "zoo" / "model_1.safetensors")), [FIT])[0].loss.tolist(),
                {n: v.tolist() for n, v in pool.statistics_of_file(file, [FIT]).items()},
                pool.evaluate(x, 1.0, FIT),
            ]
        )
    assert answers[0] == answers[1]


def test_parameters_are_there_for_one_layer_at_a_time(deep: Path) -> None:
    pool = pool_of(deep, by_layer=True)
    x = coordinates(pool.open_all("tensor").partition.count)
    model = pool.shards[0].replica.model
    seen: list[list[int]] = []

    def look(*_: object) -> None:
        seen.append([n for n, layer in enumerate(model.layers) if torch.isfinite(layer.first.weight).all()])

    for layer in model.layers:
        layer.norm.register_forward_hook(look)
    pool.begin(np.arange(COUNT), x, "float32")
    pool.step(x, 1.0, Split("fit", np.arange(5, dtype=np.int32)))
    assert seen == [[0], [0], [1], [2], [3], [3], [2], [1], [0], [0]]
    for name, parameter in model.named_parameters():
        inside = name.startswith("layers.") and not name.endswith((".shared", ".own.weight"))
        assert bool(torch.isfinite(parameter).all()) != inside, name
        assert parameter.grad is None
        assert (parameter.untyped_storage().nbytes() == 4) == inside


def test_a_model_that_uses_a_layer_from_elsewhere_is_an_error(deep: Path) -> None:
    actors = {"replicas": 1, "shards": 1, "cpus": 1, "by_layer": True}
    model = "tests.unit.actors.test_by_layer:build_leaking"
    pool = InProcess(make_recipe(values_of(deep, model=model, actors=actors)))
    x = coordinates(pool.open_all("tensor").partition.count)
    pool.begin(np.arange(COUNT), x, "float32")
    (part,) = pool.step(x, 1.0, FIT)
    assert not np.isfinite(part.loss)  # learn stops at this


def test_a_model_without_repeated_layers_is_refused(zoo: Path) -> None:
    actors = {"replicas": 1, "shards": 1, "cpus": 1, "by_layer": True}
    with pytest.raises(
        RecipeError, match=r"actors\.by_layer is true, and tests\.tiny:build has no repeated layers: .* Remove"
    ):
        InProcess(make_recipe(values_of(zoo, actors=actors))).setup(no_progress)


def test_the_key_needs_whole_replicas_and_is_not_written_unless_it_is_set(zoo: Path) -> None:
    with pytest.raises(RecipeError, match=r"by_layer is true, and shards is 2\. Expected shards: 1, or by_layer: false"):
        make_recipe(values_of(zoo, actors={"by_layer": True, "shards": 2}))
    assert "by_layer" not in dump_recipe(make_recipe(values_of(zoo)))
    assert "by_layer: true" in dump_recipe(make_recipe(values_of(zoo, actors={"by_layer": True})))


MEASURE = """
import sys, threading, time
from pathlib import Path

import numpy as np

from tests.unit.actors.test_by_layer import steps_of_llama

folder, by_layer = Path(sys.argv[1]), sys.argv[2] == "True"
steps_of_llama(folder / "small", by_layer)  # loads libraries and compiles loops
peak, done = 0, False


def private():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)


before = private()
thread = threading.Thread(target=watch)
thread.start()
figures = steps_of_llama(folder / "large", by_layer)
done = True
thread.join()
print(peak - before, *figures)
"""


def steps_of_llama(folder: Path, by_layer: bool) -> list[float]:
    """Learn for a step and evaluate an ingredient, and return what came out."""
    recipe = {
        "ingredients": str(folder / "zoo"),
        "model": f"transformers:{folder}/init?length=8",
        "data": {"fit": str(folder / "fit.jsonl")},
        "learn": {"micro_batch": 1},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1, "by_layer": by_layer},
        "precision": "float32",
    }
    pool, split = InProcess(make_recipe(recipe)), Split("fit", np.arange(2, dtype=np.int32))
    x = np.full((2, pool.open_all("model").partition.count), 0.01, np.float32)
    pool.begin(np.arange(2), x, "float32")
    (part,) = pool.step(x, 1.0, split)
    (outcome,) = pool.evaluate_file(str(folder / "zoo" / "0"), [split])
    return [part.loss, outcome.nll, *part.gradient.ravel().tolist()]


def write_llama(folder: Path, layers: int) -> int:
    """Write two fine-tunes of a Llama in bfloat16, and two texts; return the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
        max_position_embeddings=64,
    )  # fmt: skip
    for k in range(2):
        torch.manual_seed(k)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        saved(model, None, folder / "zoo" / str(k))
    saved(model, words, folder / "init")
    (folder / "fit.jsonl").write_text('{"text": "a soup"}\n{"text": "of layers"}\n')
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_private_memory_is_that_of_a_layer_and_of_what_is_held(tmp_path: Path) -> None:
    """A layer is 6 % of this model. Whole, a model takes 8 bytes a parameter for itself and its gradient."""
    write_llama(tmp_path / "small", 2)
    count, peaks, figures = write_llama(tmp_path / "large", 16), {}, {}
    for by_layer in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), str(by_layer)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peak, *figures[by_layer] = map(float, done.stdout.split())
        peaks[by_layer] = peak / count
    np.testing.assert_allclose(figures[True], figures[False], rtol=1e-4)
    assert peaks[False] > 7.5, peaks
    assert peaks[True] < 1, peaks
