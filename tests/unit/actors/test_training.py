"""Training of all weights: equal to plain torch, and bit-identical after any interruption."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ray_soup.actors import training
from ray_soup.actors.messages import TrainingJob, TrainingResult
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.progress import no_progress
from ray_soup.mixing.difference import trained
from ray_soup.recipe import make_recipe
from ray_soup.task.data import Split, batch_positions
from tests.conftest import InProcess, values
from tests.faults import Killed, killing
from tests.tiny import Tiny

FIT, SELECT = Split("fit", np.arange(0, 450, dtype=np.int32)), Split("fit", np.arange(450, 597, dtype=np.int32))
EPOCHS, BATCH, LR = 3, 128, 0.004


@pytest.fixture(scope="module")
def pool(zoo: Path) -> InProcess:
    return InProcess(make_recipe(values(zoo, learn__micro_batch=50)))


@pytest.fixture
def job_in(zoo: Path, tmp_path: Path) -> Callable[..., TrainingJob]:
    def make(name: str = "job", **changes: Any) -> TrainingJob:
        start = str(zoo / "zoo" / "model_0.safetensors")
        job = TrainingJob("training", start, str(tmp_path / name), "task", LR, 0.0, EPOCHS, BATCH, 7, "float32", FIT, SELECT)
        return replace(job, **changes)

    return make


def plain_training(zoo: Path, wd: float) -> list[tuple[dict[str, torch.Tensor], float]]:
    """Parameters and the loss on select after each epoch, by torch's own AdamW on each tensor."""
    model = Tiny()
    model.load_state_dict(load_file(zoo / "zoo" / "model_0.safetensors"))
    data = np.load(zoo / "heldout.npz")
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=wd)
    per_epoch, found = math.ceil(len(FIT) / BATCH), []
    steps = EPOCHS * per_epoch
    for epoch in range(EPOCHS):
        for n, positions in enumerate(batch_positions(len(FIT), BATCH, 7, training.ORDER, epoch)):
            step = epoch * per_epoch + n
            lr = LR * min((step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.param_groups[0]["lr"] = lr
            rows = torch.from_numpy(FIT.rows[positions]).long()
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        rows = torch.from_numpy(SELECT.rows).long()
        with torch.inference_mode():
            loss = F.cross_entropy(model(images[rows]), labels[rows]).item()
        found.append(({n: p.detach().clone() for n, p in model.named_parameters()}, loss))
    return found


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_the_steps_are_those_of_plain_torch(
    pool: InProcess, zoo: Path, job_in: Callable[..., TrainingJob], wd: float
) -> None:
    """Also with weight decay, which leaves out the tensor that has no gradient."""
    result = pool.train(job_in(wd=wd), no_progress)
    expected = plain_training(zoo, wd)
    losses = [loss for _, loss in expected]
    assert [line["select_nll"] for line in result.curve[1:]] == pytest.approx(losses, rel=1e-4)
    assert result.epoch == int(np.argmin(losses)) >= 0
    assert (result.steps, result.image_passes) == (EPOCHS * 4, EPOCHS * len(FIT))
    soup, difference = load_file(zoo / "zoo" / "model_0.safetensors"), load_file(result.difference)
    assert difference.keys() == dict(Tiny().named_parameters()).keys()
    assert not difference["unused"].any()
    for name, theirs in expected[result.epoch][0].items():
        if name != "key.bias":  # its gradient is rounding noise, which AdamW follows
            ours = trained(soup[name], difference[name], torch.float32)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("save_every_s", "kills"), [(60.0, (2, 6)), (-1.0, (1, 3, 5, 11))])
def test_a_killed_run_ends_with_the_bits_of_an_unkilled_one(
    pool: InProcess,
    zoo: Path,
    job_in: Callable[..., TrainingJob],
    monkeypatch: pytest.MonkeyPatch,
    save_every_s: float,
    kills: tuple[int, ...],
) -> None:
    """Killed within an epoch, after the last state at the end of one, or after a step that was saved."""
    whole = pool.train(job_in("whole"), no_progress)
    monkeypatch.setattr(training, "SAVE_EVERY_S", save_every_s)
    monkeypatch.setattr(training, "SAVING", math.inf)
    for at in kills:
        with pytest.raises(Killed):
            pool.train(job_in("cut"), killing(at))
        pool.handles[0].kill()  # its memory is lost, and another actor continues
        pool.setup(no_progress)
    cut = pool.train(job_in("cut"), no_progress)
    assert_same(cut, whole)
    assert_same(pool.train(job_in("cut"), no_progress), whole)  # from the state of the finished job
    left = sorted(file.name for file in Path(cut.difference).parent.iterdir())
    assert left == sorted(f"{name}{end}" for name in ("cut", "whole") for end in (f".best{cut.epoch}.safetensors", ".pt"))
    assert (Path(cut.difference).parent / "cut.pt").stat().st_size < 20_000


def assert_same(ours: TrainingResult, theirs: TrainingResult) -> None:
    assert replace(ours, difference="") == replace(theirs, difference="")
    a, b = load_file(ours.difference), load_file(theirs.difference)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_what_is_evaluated_is_what_a_file_in_16_bits_would_hold(
    pool: InProcess, zoo: Path, tmp_path: Path, job_in: Callable[..., TrainingJob]
) -> None:
    soup = {
        n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(zoo / "zoo" / "model_0.safetensors").items()
    }
    save_file(soup, tmp_path / "soup.safetensors")
    result = pool.train(job_in(start=str(tmp_path / "soup.safetensors")), no_progress)
    difference = load_file(result.difference)
    model = Tiny()
    model.load_state_dict({n: trained(t, difference[n], t.dtype) if n in difference else t for n, t in soup.items()})
    data, rows = np.load(zoo / "heldout.npz"), SELECT.rows
    with torch.inference_mode():
        logits = model(torch.from_numpy(data["images"][rows]))
    assert result.cost == pytest.approx(F.cross_entropy(logits, torch.from_numpy(data["labels"][rows])).item(), rel=1e-6)


def test_learning_goes_on_as_before_after_training(zoo: Path, job_in: Callable[..., TrainingJob]) -> None:
    pools = [InProcess(make_recipe(values(zoo))) for _ in range(2)]
    found = []
    for n, pool in enumerate(pools):
        store = pool.open_all("tensor")
        x = np.full((8, store.partition.count), 0.1, np.float32)
        pool.begin(np.arange(8), x, "float32")
        if n == 1:
            pool.train(job_in(epochs=1), no_progress)
        found.append(pool.step(x, 1.0, FIT)[0])
    assert np.array_equal(found[0].gradient, found[1].gradient)
    assert found[0].loss == found[1].loss


def test_a_loss_that_is_not_finite_ends_the_training(pool: InProcess, job_in: Callable[..., TrainingJob]) -> None:
    result = pool.train(job_in(lr=1e30), no_progress)
    assert (result.stopped, result.epoch, result.difference) == ("diverged", -1, "")
    assert result == pool.train(job_in(lr=1e30), no_progress)


def test_a_loss_that_is_not_finite_at_the_first_step_is_an_error(
    zoo: Path, tmp_path: Path, pool: InProcess, job_in: Callable[..., TrainingJob]
) -> None:
    soup = load_file(zoo / "zoo" / "model_0.safetensors")
    save_file({**soup, "embed.weight": soup["embed.weight"] * 1e38}, tmp_path / "huge.safetensors")
    with pytest.raises(SoupError, match="The loss is not finite at the first step"):
        pool.train(job_in(start=str(tmp_path / "huge.safetensors")), no_progress)


def test_a_state_that_is_damaged_or_of_another_task_is_refused(
    pool: InProcess, tmp_path: Path, job_in: Callable[..., TrainingJob]
) -> None:
    done = pool.train(job_in(), no_progress)
    with pytest.raises(RecipeError, match=r"job.pt is damaged \(it belongs to another recipe"):
        pool.train(job_in(task="other"), no_progress)
    best = Path(done.difference)
    data = bytearray(best.read_bytes())
    data[-1] ^= 1
    best.write_bytes(data)
    with pytest.raises(RecipeError, match=r"job.best\d+.safetensors is not as it was written"):
        pool.train(job_in(), no_progress)
    best.unlink()  # the state was copied while an actor still wrote
    assert pool.train(job_in(), no_progress) == done
    assert best.is_file()
    state = tmp_path / "job.pt"
    data = bytearray(state.read_bytes())
    data[data.index(b"best_cost")] ^= 1
    state.write_bytes(data)
    with pytest.raises(RecipeError, match=r"job.pt is damaged .* Remove .*job.pt to train this model from the start."):
        pool.train(job_in(), no_progress)
