"""The times that `plan --cluster` predicts for GPUs, compared with published measurements: images/s that timm publishes.

Training and inference are with automatic mixed precision, channels first; the figures are those of timm's files
results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv and benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv, -rtx4090.csv.
No GPU is needed: passes are counted on shapes. STEP and FORWARD in ray_soup/soups/cluster_plan/speeds.py are the factors
that bring the geometric means of the ratios to 1.
"""

from __future__ import annotations

import numpy as np

TRAINING = {
    ("RTX3090-24GB", "vit_base_patch32_224", 512): 1703.57,
    ("RTX3090-24GB", "vit_base_patch16_224", 192): 390.86,
    ("RTX3090-24GB", "vit_large_patch16_224", 64): 117.08,
    ("RTX3090-24GB", "resnet50", 512): 826.06,
    ("RTX3090-24GB", "convnext_base", 128): 336.98,
}
INFERENCE = {
    ("RTX3090-24GB", "vit_base_patch32_224", 1024): 5098.65,
    ("RTX3090-24GB", "vit_base_patch16_224", 1024): 1570.66,
    ("RTX3090-24GB", "vit_large_patch16_224", 1024): 486.70,
    ("RTX3090-24GB", "resnet50", 1024): 3219.06,
    ("RTX3090-24GB", "convnext_base", 1024): 1301.11,
    ("RTX4090-24GB", "vit_base_patch32_224", 1024): 10112.91,
    ("RTX4090-24GB", "vit_base_patch16_224", 1024): 2787.15,
    ("RTX4090-24GB", "vit_large_patch16_224", 1024): 912.70,
    ("RTX4090-24GB", "resnet50", 1024): 4217.60,
    ("RTX4090-24GB", "convnext_base", 1024): 2095.37,
}
"""Published images per second, by device, timm's name of the model, and batch."""


def main() -> dict[str, float]:
    """Compare every published figure."""
    from ray_soup.recipe import make_recipe
    from ray_soup.soups.cluster_plan.devices import find_device
    from ray_soup.soups.cluster_plan.shapes import Work, count_work
    from ray_soup.soups.cluster_plan.speeds import speeds_on

    works: dict[str, Work] = {}
    results: dict[str, float] = {}
    for what, published in (("training", TRAINING), ("inference", INFERENCE)):
        ratios = []
        for (device, model, batch), rate in published.items():
            recipe = make_recipe({"model": f"timm:{model}?classes=1000", "data": {"fit": "heldout.parquet"}})
            works[model] = work = works.get(model) or count_work(recipe)
            speeds = speeds_on(find_device(device), work, recipe, 10)
            seconds = (speeds.step if what == "training" else speeds.forward)(batch)
            ratios.append(seconds * rate / batch)
            results[f"{what}, {model} on {device}: predicted / published time"] = ratios[-1]
        results[f"{what}: geometric mean of the ratios"] = float(np.exp(np.mean(np.log(ratios))))
    return results
