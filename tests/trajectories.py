"""A training run at a constant learning rate, with the checkpoints that a trainer leaves: real files, made in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests import tiny

EVERY = 5


def write_run(folder: Path, count: int, every: int = EVERY, seed: int = 0) -> Path:
    """Train a tiny model on digits and keep `count` checkpoints as Transformers does, one every `every` steps."""
    images, labels = (torch.from_numpy(array[:600]) for array in tiny.digits())
    torch.manual_seed(seed)
    model = tiny.build()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n != "unused"], lr=2e-2, weight_decay=0.01)
    order = np.random.default_rng(seed)
    for step in range(1, 60 + every * count + 1):
        batch = torch.from_numpy(order.choice(600, 32, replace=False))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if step > 60 and (step - 60) % every == 0:
            at = folder / f"checkpoint-{step}"
            at.mkdir(parents=True)
            save_file(model.state_dict(), at / "model.safetensors")
            torch.save(optimizer.state_dict(), at / "optimizer.pt")
            (at / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_model_checkpoint": None}))
    return folder
