"""torch, imported when it is first used: importing it takes longer than mixing a few gigabytes.

    from ray_soup.io.lazy import torch

Commands that describe files, or mix float32 tensors of a model without buffers, never use it, although the modules that they
import could.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["torch"]


class _LazyModule(ModuleType):
    """Stands for a module that may not be imported yet."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)


if TYPE_CHECKING:
    import torch
else:
    torch = _LazyModule("torch")
