"""The recipe section `compare`."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from ray_soup.recipe.fields import PathText, Section
from ray_soup.recipe.methods import METHODS, RESERVED_NAMES
from ray_soup.recipe.plain import shown

NAME = r"\w[\w .+-]{0,99}"
"""What the name of a row looks like."""
TAKEN = {*METHODS, *RESERVED_NAMES, "mean single"}
"""Names of other rows."""


class Compare(Section):
    """What `ray-soup compare` adds to its table."""

    rows: dict[str, PathText] = Field(default={}, max_length=1000)
    """Model files that another program made, by the name of the row, as in {ties: ties.safetensors}. Each has the tensors of
    the ingredients' model, in any format that an ingredient may have. It is evaluated and tested like a soup, and never
    chosen."""

    @field_validator("rows")
    @classmethod
    def _check_names(cls, value: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in value if not re.fullmatch(NAME, name) or name != name.strip()]
        if wrong:
            raise ValueError(
                f"Expected names of letters, digits, spaces and any of _ . + -, not {', '.join(map(shown, wrong[:3]))}."
            )
        taken = [name for name in value if name in TAKEN or re.fullmatch(r"mehl\+?-m\d+", name)]
        if taken:
            raise ValueError(f"Expected names that no other row of the table has, not {', '.join(map(shown, taken[:3]))}.")
        return value
