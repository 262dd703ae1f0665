"""A merged model in the place of the base, in an actor's model of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from ray_soup.io.check import check_fits
from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet

Place: TypeAlias = "tuple[torch.nn.Module, str]"
"""A module, and the name of a tensor in it."""


class WholeFile:
    """The weights of a whole model in place of those of the base, until the base is restored.

    All factors are zero. Tied parameters that differ in the file are taken apart.
    """

    def __init__(self, model: torch.nn.Module, group: AdapterSet, path: str) -> None:
        """Load the whole model at `path` into `model`, a base with factors by PEFT.

        Raises IngredientError if it does not fit.
        """
        self._model, self._group = model, group
        self._apart: list[tuple[Place, torch.nn.Parameter]] = []
        places, opened = dict(_places(model)), open_ingredient(path)
        in_file = {name for tensors in opened.containers.values() for name in tensors}
        apart = {alias for alias in group.tied if alias in places and alias in in_file}
        heads = {tensor.base for tensor in group.whole.values() if tensor.source not in group.base.tensors}
        expected = {name: tuple(_tensor(places[name]).shape) for name in {*group.base.tensors, *heads, *apart}}
        found = check_fits(opened, expected, {a: first for a, first in group.tied.items() if a not in apart})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.zero_()
            for alias in apart:
                self._take_apart(places[alias], places[group.tied[alias]])
            for name in expected:
                tensor = _tensor(places[name])
                tensor.copy_(found.read(name).view(tensor.shape))
        found.close()

    def _take_apart(self, place: Place, first: Place) -> None:
        shared = _tensor(place)
        if shared is _tensor(first):  # PEFT may have made a copy already
            assert isinstance(shared, torch.nn.Parameter)
            self._apart.append((place, shared))
            place[0]._parameters[place[1]] = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)

    def restore(self) -> None:
        """Put the weights of the base back. Raises IngredientError if its files have changed."""
        for (owner, last), shared in self._apart:
            owner._parameters[last] = shared
        base, places = self._group.base, dict(_places(self._model, saved=False))
        with torch.no_grad():
            for name in base.tensors:
                tensor = _tensor(places[name])
                tensor.copy_(base.read(name).view(tensor.shape))
        base.check_unchanged()
        base.close()


def _tensor(place: Place) -> torch.Tensor:
    found: torch.Tensor = getattr(*place)
    return found


def _places(model: torch.nn.Module, saved: bool = True) -> Iterator[tuple[str, Place]]:
    """Yield where the tensors of a base are once PEFT has put factors into it, by their names in the base.

    Of modules to save, these are the trained copies if `saved`, otherwise the originals.
    """
    mine, others = (".modules_to_save.default", ".original_module")[:: 1 if saved else -1]
    for path, module in model.named_modules(remove_duplicate=False):
        inside = f".{path}."
        if f"{others}." in inside or ".lora_" in inside:
            continue
        name = inside.replace(f"{mine}.", ".").replace(".base_layer.", ".")[1:]
        for last in (*module._parameters, *module._buffers):
            if getattr(module, last) is not None:
                yield f"{name}{last}", (module, last)
