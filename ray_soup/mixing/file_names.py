"""How the names in a library's checkpoints differ from those in the state dict of the built model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_soup.io.lazy import torch


@dataclass(frozen=True)
class FileNames:
    """Names that occur in checkpoints only."""

    old: Mapping[str, str] = field(default_factory=dict)
    """Maps old names of tensors, such as LayerNorm.gamma, to their names in the model."""
    unsaved: tuple[re.Pattern[str], ...] = ()
    """Tensors that the model computes itself: buffers that it does not save, and constants that its library drops."""
    loader: str = ""
    """The recipe key `model`, if its library's loader knows old names (task.loader_names); otherwise empty."""


def file_names(model: torch.nn.Module) -> FileNames:
    """Return the names of `model` in files: its buffers that are not saved, and what the builder of its library knows.

    A builder sets the attributes `old_names` (a dict), `constants_in_files` (regular expressions to search for) and
    `own_loader` of the model.
    """
    buffers = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in sorted(module._non_persistent_buffers_set)
    ]
    expressions = [rf"\A{re.escape(name)}\Z" for name in buffers] + list(getattr(model, "constants_in_files", ()))
    joined = (re.compile("|".join(f"(?:{expression})" for expression in expressions)),) if expressions else ()
    return FileNames(getattr(model, "old_names", {}), joined, getattr(model, "own_loader", ""))
