"""The hyperparameters that differ between the ingredients of a soup, and the table of ingredients. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_soup.soups.report.tables import Table

if TYPE_CHECKING:
    from ray_soup.mixing.coefficients import Coefficients

Settings = Mapping[str, Sequence[Any]]
"""The values of each hyperparameter, one for each of the K ingredients."""


def varied_settings(ingredients: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the hyperparameters that every ingredient has and that differ between them.

    Args:
        ingredients: the records in run.json.
    """
    known = [dict(_flat(record.get("hyperparameters", {}))) for record in ingredients]
    shared = [name for name in (known[0] if known else ()) if all(name in one for one in known)]
    columns = {name: [one[name] for one in known] for name in shared}
    return {name: column for name, column in columns.items() if len(set(map(str, column))) > 1}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the single values of nested hyperparameters, as in `optimizer.lr`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{name}", value


def shown_value(value: Any) -> str:
    """Format a hyperparameter: numbers with up to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ingredients_table(record: Mapping[str, Any], soups: Mapping[str, Coefficients]) -> Table:
    """List the ingredients with their hyperparameters, their mean coefficient in each soup, and their digests.

    Args:
        record: run.json.
        soups: coefficients by the soup's label; soups with the same mean for all ingredients are left out.
    """
    listed = record["ingredients"]
    settings = varied_settings(listed)
    means = {name: c.shares() for name, c in soups.items()}
    shares = {
        name: dict(zip(soups[name].ingredients, some, strict=True)) for name, some in means.items() if np.ptp(some) > 1e-9
    }
    cells = []
    for k, ingredient in enumerate(listed):
        trained = [shown_value(column[k]) for column in settings.values()]
        counted = [f"{some[ingredient['name']]:.4f}" if ingredient["name"] in some else "-" for some in shares.values()]
        cells.append([ingredient["name"], *trained, *counted, ingredient["sha256"]])
    return ["ingredient", *settings, *(f"in {name}" for name in shares), "SHA-256"], cells
