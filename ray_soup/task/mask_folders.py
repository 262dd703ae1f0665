"""Images and their masks, which have the class of each pixel, in a folder with the folders `images` and `masks`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.io.cache import cached, content_key
from ray_soup.io.disk import reading_threads
from ray_soup.io.lazy import torch
from ray_soup.task.folders import FoundFiles
from ray_soup.task.image_folders import IMAGES
from ray_soup.task.preprocess import Preprocess, preprocess_identity
from ray_soup.task.raw_examples import PART, VOID, Encoded, RawExamples, Source, identity_of, reason

OF_IMAGES, OF_MASKS = "images", "masks"
Color = tuple[int, ...]
MODES = ("L", "P", "1")
"""Modes of PIL whose pixels are numbers up to 255."""
LOSSY = ("JPEG", "MPO")
"""Formats of PIL that change the numbers of pixels."""
ORIENTATION = 0x0112
"""The EXIF tag that says how viewers turn an image; neither torchvision nor `open_image` does."""
MOVING = (
    "Resize", "CenterCrop", "Pad", "ToImage", "PILToTensor", "ToTensor", "ToDtype", "ConvertImageDtype", "Normalize", "RGB",
    "Grayscale", "Identity",
)  # fmt: skip
"""Transforms of torchvision.transforms.v2 that move the pixels of masks as they move those of images, and not at random."""


def read_mask_folder(source: Source, folder: Path, scan: FoundFiles) -> RawExamples:
    """Pair images/NAME.jpg with masks/NAME.png, in any folders below and with any suffixes of images.

    The targets are zeros until `with_masks` decodes the masks. Raises RecipeError if a file has no counterpart.
    """
    images, masks = (_by_name(source, folder / top, scan.files.get(top, [])) for top in (OF_IMAGES, OF_MASKS))
    if not images or not masks:
        tops = ", ".join(sorted(name for name, files in scan.files.items() if name and files)) or "no folder"
        raise source.error(
            f"has images in {tops}; the objective needs a class for each pixel, so expected {OF_IMAGES}/NAME.jpg and "
            f"{OF_MASKS}/NAME.png, whose pixels are the numbers of classes. Or use an .npz file, Parquet, or a function."
        )
    for ours, theirs, other in ((images, masks, OF_MASKS), (masks, images, OF_IMAGES)):
        alone = sorted(ours.keys() - theirs.keys())
        if alone:
            raise source.error(
                f"{ours[alone[0]].relative_to(folder)} has no counterpart in {other} ({len(alone)} such files); expected "
                f"{other}/{alone[0]} with the suffix of an image. Add or remove files."
            )
    names = sorted(images)
    files, of_masks = [images[name] for name in names], [masks[name] for name in names]

    def parts() -> Iterator[list[Any]]:
        return (list(files[first : first + PART]) for first in range(0, len(files), PART))

    def where(row: int) -> str:
        return f"row {row} ({files[row].relative_to(folder)})"

    identity = ("masks", identity_of(source, files), identity_of(source, of_masks))
    zeros = np.zeros(len(names), np.int64)
    return RawExamples(source, zeros, None, parts, identity, where=where, notes=tuple(scan.notes), masks=tuple(of_masks))


def _by_name(source: Source, folder: Path, files: list[Path]) -> dict[str, Path]:
    """Return image files by their path in a folder, without the suffix. Raises RecipeError if two have the same."""
    found: dict[str, Path] = {}
    for file in files:
        if file.name.lower().endswith(IMAGES):
            name = str(file.relative_to(folder).with_suffix(""))
            twin = found.setdefault(name, file)
            if twin is not file:
                raise source.error(f"{file} and {twin} differ in their suffix only; expected one file. Remove one.")
    return found


def with_masks(raw: RawExamples, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, RawExamples]:
    """Decode the masks of a source, moved by the preprocessing of its images: targets [n, H, W].

    Yields (masks decoded, total). Raises RecipeError for a mask that cannot be used.
    """
    if preprocess is None or not _moves_masks(preprocess):
        raise raw.source.error(
            "has masks, and the model's preprocessing is not known to move their pixels as it moves those of images. Return "
            "(model, preprocess) with a Compose of torchvision.transforms.v2, such as Resize, PILToTensor, ToDtype and "
            "Normalize, or store arrays in an .npz file."
        )
    total = len(raw.masks)

    def decoded(row: int, image: Encoded) -> tuple[np.ndarray, dict[int, Color]]:
        try:
            return _mask(image, raw.masks[row], preprocess)
        except Exception as error:  # PIL raises almost anything
            raise raw.source.error(
                f"the mask of {raw.where(row)} cannot be used ({reason(error)}). Repair or remove both."
            ) from error

    first, _ = decoded(0, next(raw.parts())[0])

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        found, done = np.empty((total, *first.shape), np.uint8), 0
        known: dict[int, tuple[Color, int]] = {}
        with ThreadPoolExecutor(reading_threads()) as pool:
            for images in raw.parts():
                rows = range(done, min(done + len(images), total))
                for row, (mask, colors) in zip(rows, pool.map(decoded, rows, images), strict=True):
                    _check_colors(raw, row, colors, known)
                    if mask.shape != first.shape:
                        raise raw.source.error(
                            f"the mask of {raw.where(row)} becomes {list(mask.shape)} pixels, and that of row 0 "
                            f"{list(first.shape)}. Resize all images to one shape, as in resize_size=HEIGHT,WIDTH."
                        )
                    found[row] = mask
                done += len(images)
                yield done, total
        if done != total:
            raise raw.source.error(f"{done} images and {total} masks: the files changed while they were read. Try again.")
        _check_classes(raw.source, found)
        np.save(folder / "masks.npy", found)

    key = content_key("masks", 2, raw.identity, preprocess_identity(preprocess))
    hold = yield from cached("data", key, total * first.size, make)
    labels = np.load(hold.path / "masks.npy")
    hold.close()
    return replace(raw, labels=labels, masks=())


def _moves_masks(preprocess: Any) -> bool:
    """Return whether a preprocessing moves the pixels of masks as those of images, and else leaves masks alone."""
    names = _names(preprocess)
    if names[-1:] == ["ToPureTensor"]:  # what follows it would take masks for images
        names.pop()
    return all(name in MOVING for name in names)


def _names(part: Any) -> list[str]:
    """Return the names of the transforms of torchvision.transforms.v2 that a preprocessing consists of; "" for others."""
    kind = type(part)
    if not kind.__module__.startswith("torchvision.transforms.v2."):
        return [""]
    return [name for inner in part.transforms for name in _names(inner)] if kind.__name__ == "Compose" else [kind.__name__]


def _mask(image: Encoded, mask: Encoded, preprocess: Preprocess) -> tuple[np.ndarray, dict[int, Color]]:
    """Return the classes of the pixels of a preprocessed image, uint8 [H, W], and their colors in a mask with a palette.

    Raises ValueError.
    """
    from PIL import Image
    from torchvision.tv_tensors import Mask

    with Image.open(_file(image)) as opened:
        size, turned = opened.size, _orientation(opened)
    with Image.open(_file(mask)) as opened:
        if opened.format in LOSSY:
            raise ValueError("it is a JPEG file, whose compression changes the numbers of classes; expected PNG")
        if opened.mode not in MODES:
            raise ValueError(f"its mode is {opened.mode}; expected the number of a class in each pixel: L, P or 1")
        upright = size if turned < 5 else size[::-1]
        if turned not in (1, _orientation(opened)) and opened.size == upright:
            raise ValueError(
                f"the image has the EXIF orientation {turned}, which is not applied, and the mask may be for the image as "
                "viewers turn it; turn the image or the mask, so that both fit, and save them without an orientation"
            )
        if opened.size != size:
            raise ValueError(f"it has {opened.width} x {opened.height} pixels, and the image {size[0]} x {size[1]}")
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size[0] * size[1] > limit:
            raise ValueError(f"{size[0]} x {size[1]} pixels; the limit is {limit:,} pixels")
        pixels = np.array(opened).astype(np.uint8)
        palette = np.reshape(opened.getpalette() or [], (-1, 3)).tolist()
    colors = {number: (*palette[number],) for number in np.unique(pixels).tolist() if number < len(palette)}
    moved: np.ndarray = np.asarray(preprocess(Mask(torch.from_numpy(pixels)[None])))[0]
    return moved.astype(np.uint8), colors


def _orientation(image: Any) -> int:
    """Return the EXIF orientation of an open image: 1 if it is upright, or does not say."""
    from PIL import Image

    exif = Image.Exif()
    with contextlib.suppress(Exception):  # readers ignore damaged EXIF data
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ORIENTATION, 1))
    return 1


def _check_colors(raw: RawExamples, row: int, colors: dict[int, Color], known: dict[int, tuple[Color, int]]) -> None:
    """Check that a number has one color in the palettes of all masks: programs renumber colors. Raises RecipeError."""
    for number, color in colors.items():
        before, other = known.setdefault(number, (color, row))
        if color != before:
            raise raw.source.error(
                f"the palettes of the masks differ: pixels of {number} have the color {color} in that of {raw.where(row)}, "
                f"and {before} in that of {raw.where(other)}. Expected the number of a class in each pixel. Save the "
                "numbers as grayscale images, or with one palette for all."
            )


def _file(value: Encoded) -> io.BytesIO | Path:
    return io.BytesIO(value) if isinstance(value, bytes) else value


def _check_classes(source: Source, masks: np.ndarray) -> None:
    """Check that masks do not use VOID for a class of their own. Raises RecipeError."""
    found = set(np.unique(masks).tolist())
    if VOID in found and len(found) <= 2:
        raise source.error(
            f"its masks have the numbers {' and '.join(map(str, sorted(found)))} only, and pixels of {VOID} are not scored. "
            f"Write 1 for {VOID} if that is a class."
        )
