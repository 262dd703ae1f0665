"""The recipe key `preprocess` as a mapping: how images become inputs of the model."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_soup.recipe.fields import Section

LARGEST = 99_999
"""Pixels of the longest side of an image."""


class Preprocessing(Section):
    """How images are preprocessed, as they were in the training. What is left out is as the model's library has it."""

    size: int | list[int] | None = None
    """Height and width of the inputs in pixels: one number if they are equal, otherwise [height, width]."""
    mean: float | list[float] | None = None
    """What is subtracted from pixels between 0 and 1: one number, or one for each channel."""
    std: float | list[float] | None = None
    """What the difference is divided by: one positive number, or one for each channel."""
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    """Share of the resized image that the center crop keeps: images are resized to size / crop_pct, then cropped to size."""
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = None
    """How pixels are interpolated when images are resized."""
    channels: Literal[1, 3] | None = None
    """1: images are converted to grayscale; 3: to RGB."""

    @field_validator("size", mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if value is None:
            return value
        values = [*value] if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
        whole = [int(v) for v in numbers if v == int(v)]
        if len(whole) != len(values) or not all(1 <= v <= LARGEST for v in whole):
            raise ValueError("Expected a number of pixels, or [height, width].")
        return whole if len(whole) == 2 else whole[0]

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _check_channels(cls, value: Any) -> Any:
        values = [*value] if isinstance(value, (list, tuple)) and len(value) in (1, 3) else [value]
        if value is not None and not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            raise ValueError("Expected one number, or a list with one for each channel.")
        return [*map(float, values)] if isinstance(value, (list, tuple)) else value

    @field_validator("channels", mode="before")
    @classmethod
    def _check_count(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("Expected 1 or 3.")
        return value

    @field_validator("std")
    @classmethod
    def _check_positive(cls, value: Any) -> Any:
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            raise ValueError("Expected positive numbers.")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Preprocessing:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if self.channels is not None and isinstance(value, list) and len(value) not in (1, self.channels):
                raise ValueError(f"{name} has {len(value)} values, and channels is {self.channels}. Make them agree.")
        if all(value is None for value in self.values().values()):
            raise ValueError(f"Expected one or more of {', '.join(type(self).model_fields)}.")
        return self

    def values(self) -> dict[str, Any]:
        """Return the values that are stated, by their keys."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}
