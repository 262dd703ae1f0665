"""Data augmentation of training images: RandAugment and random translation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ray_soup.errors import RecipeError
from ray_soup.task.preprocess import Preprocess, Tail, input_kind
from ray_soup.tune.records import Hyperparameters


class Augment:
    """Look up images by row, apply RandAugment, then the tail of the preprocessing, then a random translation.

    Args:
        images: any dtype [n, ...], as stored in the data source.
        hyper: `randaugment` is the magnitude of RandAugment and `shift` the largest translation in pixels; 0 turns each off.
        tail: the end of the preprocessing, if the images are stored without this step.

    Raises RecipeError if RandAugment is on and the images are not [n, height, width] or [n, 1 or 3, height, width].
    """

    def __init__(self, images: np.ndarray, hyper: Hyperparameters, tail: Tail | None = None) -> None:
        self.images, self.tail, self.shift = images, tail, int(hyper["shift"])
        self.randaugment: Any = None
        if hyper["randaugment"]:
            from torchvision.transforms import v2

            shape = images.shape[1:]
            if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
                raise RecipeError(
                    f"finetune.randaugment needs images of [height, width] or [1 or 3, height, width]; found "
                    f"{list(shape)}. Set it to 0."
                )
            self.randaugment = v2.RandAugment(magnitude=int(hyper["randaugment"]))
            # RandAugment works on 8 bits; float images may be normalized in any way, so their range comes from a sample
            sample = images[:1024]
            self.low, self.high = (0.0, 255.0) if images.dtype == np.uint8 else (float(sample.min()), float(sample.max()))

    def __call__(self, rows: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Return the augmented images [n, ...] of `rows`.

        Args:
            rows: int [n].
            random: draws the translations; RandAugment uses torch's global generator.
        """
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        if self.randaugment is not None:
            images = self._distorted(images)
        if self.tail is not None:
            images = self.tail(images)
        return shifted(images, self.shift, random) if self.shift else images

    def _distorted(self, images: torch.Tensor) -> torch.Tensor:
        scale = (self.high - self.low) / 255 or 1.0
        pixels = ((images.float() - self.low) / scale).round().clamp(0, 255).to(torch.uint8)
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        pixels = torch.stack([self.randaugment(image) for image in pixels]).view(images.shape)
        return pixels if images.dtype == torch.uint8 else (pixels.float() * scale + self.low).to(images.dtype)


def shifted(images: torch.Tensor, most: int, random: np.random.Generator) -> torch.Tensor:
    """Translate each image by up to `most` pixels in each direction and fill with zeros.

    Args:
        images: any dtype [n, ..., height, width].
        most: largest translation in pixels.
        random: draws two offsets for each image.
    """
    padded = F.pad(images, (most, most, most, most))
    height, width = images.shape[-2:]
    moved = [
        image[..., top : top + height, left : left + width]
        for image, (top, left) in zip(padded, random.integers(0, 2 * most + 1, (len(images), 2)), strict=True)
    ]
    return torch.stack(moved)


def check_augmentation(preprocess: Preprocess | None, hyper: Hyperparameters) -> None:
    """Check that the augmentation fits the model's inputs. Raises RecipeError if it does not."""
    if input_kind(preprocess) == "text" and (hyper["mixup"] or hyper["shift"] or hyper["randaugment"]):
        raise RecipeError(
            "finetune: mixup, shift and randaugment work on images, and this model's inputs are texts. Set all three to 0."
        )
