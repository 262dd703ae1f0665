"""The recipe key `blocks`: which parameters share a coefficient."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

MOST_GROUPS = 65_536


def _checked(value: Any) -> Any:
    """Check the mapping {tensor: R}, whose faults would otherwise be those of a number. Raises ValueError."""
    if not isinstance(value, dict):
        return value
    groups = value.get("tensor")
    if isinstance(groups, float) and groups.is_integer():
        groups = int(groups)
    if value.keys() != {"tensor"} or type(groups) is not int or not 1 <= groups <= MOST_GROUPS:
        raise ValueError(
            f"Expected the number of groups that the rows of a tensor form, 1 to {MOST_GROUPS:,}, as in {{tensor: 4}}."
        )
    return {"tensor": groups}


Blocks = Annotated[
    Literal["auto", "tensor", "layer", "model"] | Annotated[int, Field(ge=1, le=10**15)] | dict[Literal["tensor"], int],
    BeforeValidator(_checked),
]
