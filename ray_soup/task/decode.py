"""Decode encoded images and texts, and preprocess them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.io.disk import reading_threads
from ray_soup.task.functions import own_lines
from ray_soup.task.preprocess import Preprocess, Tail, cut_tail, input_kind
from ray_soup.task.raw_examples import NUMBERS, RawExamples, check_finite, reason


@dataclass(frozen=True)
class Decoder:
    """Decodes the examples of one source, all to the same shape and dtype."""

    raw: RawExamples
    apply: Callable[[Any], np.ndarray]
    """Maps one encoded image, path or text to an array."""
    tail: Tail | None
    """The rest of the preprocessing, which `apply` leaves out."""
    first: np.ndarray
    """The first example, decoded."""

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the decoded source in stacked parts; in threads, because PIL releases the GIL while it decodes and resizes.

        Raises RecipeError for an example that cannot be decoded, has another shape, or contains NaN or infinity.
        """
        done = 0
        with ThreadPoolExecutor(reading_threads()) as pool:
            for values in self.raw.parts():
                part = np.stack(list(pool.map(self._decoded, range(done, done + len(values)), values)))
                check_finite(self.raw.source, part, done)
                yield part
                done += len(values)
        if done != len(self.raw.labels):
            raise self.raw.source.error(
                f"found {done} examples and {len(self.raw.labels)} labels. The files changed while they were read: rerun "
                "the command."
            )

    def _decoded(self, row: int, value: Any) -> np.ndarray:
        found: np.ndarray = _naming_row(self.raw, row, self.apply, value)
        if found.shape != self.first.shape or found.dtype != self.first.dtype:
            raise self.raw.source.error(
                f"{self.raw.where(row)} becomes {found.dtype} {list(found.shape)} and row 0 {self.first.dtype} "
                f"{list(self.first.shape)}. Change the preprocessing so that all examples have the same shape."
            )
        return found


def decoder_of(raw: RawExamples, preprocess: Preprocess | None) -> Decoder:
    """Return the decoder of a source, after decoding its first example. Raises RecipeError if that fails."""
    if preprocess is None:
        raise raw.source.error(
            "contains encoded images or texts, and the model has no preprocessing for them. State that of images, as in "
            "preprocess: {size: 224, mean: 0.5, std: 0.5}, return (model, preprocess) from the model's function, or use an "
            ".npz file of arrays."
        )
    value = next(raw.parts())[0]
    tail = None
    if input_kind(preprocess) == "text":

        def apply(value: Any) -> np.ndarray:
            return np.asarray(preprocess(value))
    else:
        cut = _naming_row(raw, 0, lambda value: cut_tail(preprocess, open_image(value)), value)
        body, tail = cut or (lambda image: np.asarray(preprocess(image)), None)

        def apply(value: Any) -> np.ndarray:
            return body(open_image(value))

    first = _naming_row(raw, 0, apply, value)
    if first.dtype.kind not in NUMBERS:
        raise raw.source.error(
            f"{raw.where(0)} becomes {first.dtype} {list(first.shape)}; expected an array of numbers. Change the "
            "preprocessing."
        )
    return Decoder(raw, apply, tail, first)


def open_image(value: bytes | Path) -> Any:
    """Decode an encoded image, or an image file, to a PIL image in RGB, as torchvision and open_clip do.

    Raises ValueError for an image with more than PIL's limit of pixels, before it is decoded.
    """
    from PIL import Image

    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels; the limit is {limit:,} pixels")
        return image.convert("RGB")


def _naming_row(raw: RawExamples, row: int, work: Callable[[Any], Any], value: Any) -> Any:
    """Call `work(value)`; its errors become a RecipeError that names the source and the row."""
    try:
        return work(value)
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:  # PIL and the user's preprocessing raise almost anything
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        lines = "".join(f"\n    {line}" for line in own_lines(error, only=True))  # of the user's preprocessing
        raise raw.source.error(
            f"the example at {raw.where(row)} cannot be decoded ({kind}{reason(error)})."
            + (f"{lines}\nFix the preprocessing, or repair" if lines else " Repair")
            + " or remove the example."
        ) from error
