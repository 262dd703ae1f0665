"""What makes a model's input of an image or a text: known by its content, and cut before its last arithmetic on pixels.

Most preprocessings end with pixels p in uint8 becoming (p / 255 - mean) / std. What comes before that is worth keeping: it
takes a quarter of the room, and the rest is done for a whole batch where the model is.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Preprocess = Callable[[Any], Any]
"""Of one PIL image, or one str where its attribute `takes` is "text": an array of the same shape for each."""


@dataclass(frozen=True)
class Named:
    """A preprocessing that is known by a text: by what it was made from."""

    apply: Callable[[Any], Any]
    text: str
    takes: str = "image"

    def __call__(self, example: Any) -> Any:
        return self.apply(example)


LIBRARIES = ("torchvision", "timm", "open_clip")
CONVERT = ("ToTensor", "MaybeToTensor", "ConvertImageDtype", "ToDtype")


def takes(preprocess: Preprocess | None) -> str:
    """ "image" or "text"."""
    return getattr(preprocess, "takes", "image")


def identity(preprocess: Any) -> list[str]:
    """Names, settings and source of a preprocessing: the same in every process, another one when it changes."""
    found = []
    for part in getattr(preprocess, "transforms", [preprocess]):
        if isinstance(part, Named):
            found.append(part.text)
            continue
        kind = part if inspect.isroutine(part) else type(part)
        module = getattr(kind, "__module__", "")
        held = {} if isinstance(part, torch.nn.Module) else getattr(part, "__dict__", {})
        cells = [cell.cell_contents for cell in getattr(part, "__closure__", None) or ()]
        text = f"{module} {getattr(kind, '__qualname__', '')} {part!r} {held} {cells}"
        source = ""
        if module.partition(".")[0] not in LIBRARIES:
            with suppress(OSError, TypeError, KeyError):
                source = inspect.getsource(sys.modules[module])
        found.append(re.sub(r" at 0x[0-9a-f]+", "", text) + source)
    return found


@dataclass(frozen=True)
class Tail:
    """The end of a preprocessing: pixels uint8 [n, C, H, W] become (p / 255 - mean) / std, float32."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    divides: bool
    """p / 255, else p * (1 / 255): they differ in the last bit."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        images = pixels.float()
        if self.divides:
            images.div_(torch.full((), 255.0, device=pixels.device))  # CUDA would multiply with the inverse of a number
        else:
            images.mul_(1.0 / 255)
        return images.sub_(mean).div_(std)


def cut_tail(preprocess: Preprocess, image: Any) -> tuple[Callable[[Any], np.ndarray], Tail] | None:
    """What makes pixels uint8 [C, H, W] of a PIL image, and the tail that takes it from there; None where `preprocess` does
    not end so, bit for bit, for each of the 256 values of a pixel. `image` is one of those to come."""
    parts = _parts(preprocess)
    if parts is None:
        return None
    body, end, mean, std = parts

    def pixels_of(image: Any) -> np.ndarray:
        for transform in body:
            image = transform(image)
        if isinstance(image, torch.Tensor):
            return image.numpy()
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    try:
        pixels = pixels_of(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3:
            return None
        every = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(pixels), 1, 256)).copy()
        expected = end(_like(image, every, body))
    except (TypeError, ValueError, RuntimeError):
        return None
    for divides in (True, False):
        tail = Tail(mean, std, divides)
        found = tail(torch.from_numpy(every)[None])[0]
        if found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected):
            return pixels_of, tail
    return None


def _like(image: Any, pixels: np.ndarray, body: Sequence[Callable[[Any], Any]]) -> Any:
    """Pixels uint8 [C, H, W] in the form in which the body hands on an image."""
    from PIL import Image

    for transform in body:
        image = transform(image)
    if isinstance(image, torch.Tensor):
        return torch.from_numpy(pixels)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _parts(
    preprocess: Any,
) -> tuple[Sequence[Callable[[Any], Any]], Callable[[Any], torch.Tensor], tuple[float, ...], tuple[float, ...]] | None:
    """The transforms up to pixels, those after it as one, mean and std; None where they are not known by their names."""
    if _name(preprocess) == "ImageClassification":  # torchvision's, of its weights
        from torchvision.transforms import functional as F

        p = preprocess

        def body(image: Any) -> Any:
            resized = F.resize(image, p.resize_size, interpolation=p.interpolation, antialias=p.antialias)
            return F.pil_to_tensor(F.center_crop(resized, p.crop_size))

        def end(pixels: Any) -> torch.Tensor:
            return F.normalize(F.convert_image_dtype(pixels, torch.float), mean=p.mean, std=p.std)

        return [body], end, _numbers(p.mean), _numbers(p.std)
    if _name(preprocess) != "Compose" or len(preprocess.transforms) < 2:
        return None
    *before, convert, normalize = preprocess.transforms
    if _name(normalize) != "Normalize" or _name(convert) not in CONVERT:
        return None
    return before, lambda pixels: normalize(convert(pixels)), _numbers(normalize.mean), _numbers(normalize.std)


def _name(transform: Any) -> str:
    """The class of a transform of one of the libraries that we know."""
    kind = type(transform)
    return kind.__name__ if kind.__module__.partition(".")[0] in LIBRARIES else ""


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
