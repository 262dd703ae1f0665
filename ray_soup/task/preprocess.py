"""Preprocessing of one image or text: its identity in cache keys, and how to split off its last arithmetic steps.

Most preprocessing ends by mapping pixels p in uint8 to (p / 255 - mean) / std. Images are cached before that step: they take
a quarter of the space, and the step runs on whole batches on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_soup.io.lazy import torch
from ray_soup.task.identity import identify
from ray_soup.task.values import Settings, numbers, pair, size_text

Preprocess = Callable[[Any], Any]
"""Maps one PIL image (or one str if its attribute `takes` is "text") to an array or tensor, always of the same shape."""


@dataclass(frozen=True)
class NamedPreprocess:
    """A preprocessing that is identified by a text."""

    apply: Callable[[Any], Any]
    text: str
    """Everything that the result depends on besides the input."""
    takes: str = "image"
    """The input: "image" or "text"."""

    def __call__(self, example: Any) -> Any:
        """Preprocess one image or text."""
        return self.apply(example)


LIBRARIES = ("torchvision", "timm", "open_clip")
"""Libraries whose transforms print all their settings."""
CONVERT = ("ToTensor", "MaybeToTensor", "ConvertImageDtype", "ToDtype")
"""Transforms of these libraries that turn uint8 pixels into floats."""


def input_kind(preprocess: Preprocess | None) -> str:
    """Return "image" or "text": the kind of input that a preprocessing takes."""
    return getattr(preprocess, "takes", "image")


def preprocess_identity(preprocess: Any, outside: list[str] | None = None) -> list[str]:
    """Describe a preprocessing, or another function, by names, settings and code, for cache keys.

    The texts are the same in every process, and change whenever the preprocessing changes: an edit of a module of the user's
    that it imports is enough. What cannot be identified, such as code that reads a file, has other texts in every run, and
    its names are added to `outside`.
    """
    parts = preprocess.transforms if _class_name(preprocess) == "Compose" else [preprocess]
    return [part.text if isinstance(part, NamedPreprocess) else _identified(part, outside) for part in parts]


def _identified(part: Any, outside: list[str] | None) -> str:
    return f"{_kind(part)} {identify(part, outside=outside)}"


def _kind(part: Any) -> str:
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class Tail:
    """The end of a preprocessing: (p / 255 - mean) / std of pixels p."""

    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    divides: bool
    """Whether to compute p / 255 and not p * (1 / 255): the results differ in the last bit."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels uint8 [n, C, H, W] to images float32 [n, C, H, W]."""
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        images = pixels.float()
        if self.divides:
            images.div_(torch.full((), 255.0, device=pixels.device))  # CUDA multiplies by the inverse of a Python scalar
        else:
            images.mul_(1.0 / 255)
        return images.sub_(mean).div_(std)


def cut_tail(preprocess: Preprocess, image: Any) -> tuple[Callable[[Any], np.ndarray], Tail] | None:
    """Split a preprocessing into a function that returns pixels, and the tail that continues from the pixels.

    Args:
        preprocess: a transform of torchvision, timm or open_clip, or any other function.
        image: a PIL image to try the transform on.

    Returns a function from PIL image to pixels uint8 [C, H, W], and the tail; None if the tail does not reproduce the end of
    `preprocess` bit for bit for each of the 256 values of a pixel.
    """
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
        expected = end(_as_after(body, image, every))
    except (TypeError, ValueError, RuntimeError):
        return None
    for divides in (True, False):
        tail = Tail(mean, std, divides)
        found = tail(torch.from_numpy(every)[None])[0]
        if found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected):
            return pixels_of, tail
    return None


def _as_after(body: Sequence[Callable[[Any], Any]], image: Any, pixels: np.ndarray) -> Any:
    """Put pixels uint8 [C, H, W] into the type that `body` returns for `image`: a tensor or a PIL image."""
    from PIL import Image

    for transform in body:
        image = transform(image)
    if isinstance(image, torch.Tensor):
        return torch.from_numpy(pixels)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _parts(
    preprocess: Any,
) -> tuple[Sequence[Callable[[Any], Any]], Callable[[Any], torch.Tensor], tuple[float, ...], tuple[float, ...]] | None:
    """Return the transforms up to pixels, the rest as one function, mean and std; None for an unknown preprocessing."""
    if _class_name(preprocess) == "ImageClassification":  # the preset of torchvision's weights
        from torchvision.transforms import functional as F

        p = preprocess

        def body(image: Any) -> Any:
            resized = F.resize(image, p.resize_size, interpolation=p.interpolation, antialias=p.antialias)
            return F.pil_to_tensor(F.center_crop(resized, p.crop_size))

        def end(pixels: Any) -> torch.Tensor:
            images: torch.Tensor = F.normalize(F.convert_image_dtype(pixels, torch.float), mean=p.mean, std=p.std)
            return images

        return [body], end, _floats(p.mean), _floats(p.std)
    if _class_name(preprocess) != "Compose" or len(preprocess.transforms) < 2:
        return None
    *before, convert, normalize = preprocess.transforms
    if _class_name(normalize) != "Normalize" or _class_name(convert) not in CONVERT:
        return None
    return before, lambda pixels: normalize(convert(pixels)), _floats(normalize.mean), _floats(normalize.std)


KEEP_SIZE = (*CONVERT, "PILToTensor", "MaybePILToTensor", "ToImage", "MaybeConvertMode", "RGB", "Grayscale", "Normalize")
"""Transforms of these libraries that keep the size of an image."""
CUT_TO_SIZE = ("CenterCrop", "CenterCropOrPad", "RandomCrop", "RandomResizedCrop")
RESIZE = ("Resize", "ResizeKeepRatio")


def visible_settings(preprocess: Any) -> Settings:
    """Return what a transform of one of LIBRARIES shows, as a recipe writes it.

    This is its `size`, `channels`, `mean`, `std` and `interpolation`, and `crop`: the share of the resized image that is
    kept, or squash or border where images are resized to another shape. Of a tokenization it is the `length`.

    Raises RuntimeError for a transform that was created on the device meta.
    """
    if _class_name(preprocess) == "ImageClassification":
        p = preprocess
        found = {"size": size_text(pair(p.crop_size)), "crop": share_text(p.crop_size[0], p.resize_size[0])}
        found |= {"interpolation": p.interpolation.value, "channels": "3"}
        return found | {"mean": numbers(_floats(p.mean)), "std": numbers(_floats(p.std))}
    if input_kind(preprocess) != "image" and hasattr(preprocess, "length"):
        return {"length": str(preprocess.length)}
    found, resized = Settings(), None
    for part in preprocess.transforms if _class_name(preprocess) == "Compose" else ():
        kind = _class_name(part)
        if kind in RESIZE:
            resized = part
            interpolation = getattr(part, "interpolation", None)
            found |= {"interpolation": str(getattr(interpolation, "value", interpolation))}
        if kind in CUT_TO_SIZE or (kind == "Resize" and isinstance(part.size, (list, tuple)) and len(part.size) == 2):
            found |= {"size": size_text(pair(part.size)), "crop": _crop(resized, pair(part.size))}
        elif kind not in KEEP_SIZE:
            found.pop("size", None)
            found.pop("crop", None)
        if kind in ("Grayscale", "Normalize"):  # images are opened in RGB
            found.setdefault("channels", str(getattr(part, "num_output_channels", 3)))
        if kind == "Normalize":
            found |= {"mean": numbers(_written(part.mean)), "std": numbers(_written(part.std))}
    return {name: value for name, value in found.items() if value}


def share_text(kept: int, resized: int) -> str:
    """Write the share of a resized image that a crop keeps."""
    return f"{kept / resized:.6g}"


def _crop(resize: Any, size: tuple[int, int]) -> str:
    """Describe how a crop follows a resize; empty if that is not known."""
    edges = getattr(resize, "size", None)
    if edges is None:
        return ""
    whole = isinstance(edges, (list, tuple)) and len(edges) == 2
    kind = "squash" if whole and _class_name(resize) == "Resize" else "border" if getattr(resize, "longest", 0) else ""
    share = share_text(size[0], pair(edges)[0])
    return share if not kind else kind if share == "1" else f"{kind} {share}"


def _class_name(transform: Any) -> str:
    """Return the class of a transform of one of LIBRARIES, or an empty string."""
    kind = type(transform)
    return kind.__name__ if kind.__module__.partition(".")[0] in LIBRARIES else ""


def _written(values: Any) -> tuple[float, ...]:
    """Return numbers as they were probably written, before a tensor rounded them to float32."""
    if isinstance(values, torch.Tensor) and values.dtype == torch.float32:
        return tuple(float(str(value)) for value in values.numpy())
    return _floats(values)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
