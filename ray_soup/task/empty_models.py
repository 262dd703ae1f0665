"""Build a model whose parameters take no memory, for a caller that fills them in by itself."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_soup.io.lazy import torch
from ray_soup.task.libraries import BuiltModel


def build_empty(build: Callable[[], BuiltModel], device: torch.device) -> BuiltModel:
    """Call `build`, and return its model with parameters on `device` that are all 0 and must not be written to.

    A model that cannot be built without its parameters is built with them first. Raises what `build` raises.
    """
    built: BuiltModel | None = None
    with contextlib.suppress(Exception), _without_parameters():
        built = build()
    if built is None:
        built = build()
    empty: dict[int, torch.nn.Parameter] = {}
    zero = torch.zeros((), device=device)
    for module in built.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.nn.Parameter(zero.to(parameter.dtype).expand(parameter.shape), parameter.requires_grad)
                module._parameters[name] = empty.setdefault(id(parameter), made)
    return built


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Let parameters lose their memory as soon as a module gets them; buffers keep theirs."""
    register = torch.nn.Module.register_parameter
    known: dict[int, tuple[weakref.ref[torch.nn.Parameter], torch.nn.Parameter]] = {}

    def register_empty(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and type(parameter) is torch.nn.Parameter:
            original, empty = known.get(id(parameter), (None, None))
            if original is None or original() is not parameter:
                empty = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                known[id(parameter)] = weakref.ref(parameter), empty
            parameter = empty
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_empty  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
