"""Images, files of images, and preprocessings of them, for the tests of data."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tests.tiny import digits


def as_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("L")).copy())


def pairs() -> list[tuple[np.ndarray, int]]:
    """A dataset for `module:function`: the first 30 digits."""
    images, labels = digits()
    return list(zip(images[:30], labels[:30].tolist(), strict=True))


def repeated() -> list[tuple[np.ndarray, int]]:
    """Ten digits, each five times, in random order."""
    images, labels = digits()
    rows = np.random.default_rng(0).permutation(50) % 10
    return [(images[row], int(labels[row])) for row in rows]


def pictures(count: int = 6) -> list[Image.Image]:
    """Images of several sizes, smooth as photographs are."""
    random = np.random.default_rng(0)
    small = [Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((70 + 5 * k, 90 - 3 * k), Image.Resampling.BICUBIC) for k, image in enumerate(small)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, images: Sequence[Any], labels: Sequence[int], broken: int | None = None) -> None:
    """Write images as datasets on the Hub do: a struct of the encoded bytes and a path."""
    values = [
        {"bytes": b"no image" if row == broken else png(image), "path": f"{row}.png"} for row, image in enumerate(images)
    ]
    pq.write_table(pa.table({"image": values, "label": labels}), path)


def preprocessings() -> dict[str, tuple[Any, type]]:
    """Preprocessings, and the dtype that their images are cached in."""
    import open_clip
    from timm.data import create_transform
    from torchvision import transforms as v1
    from torchvision.transforms import v2
    from torchvision.transforms._presets import ImageClassification

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    on_tensors = [v2.ToImage(), v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)]
    return {
        "open_clip": (open_clip.image_transform(32, is_train=False), np.uint8),
        "timm": (create_transform(32), np.uint8),
        "weights": (ImageClassification(crop_size=32, resize_size=40), np.uint8),
        "v1": (v1.Compose([v1.Resize((32, 32)), v1.PILToTensor(), v1.ConvertImageDtype(torch.float32),
                           v1.Normalize(mean, std)]), np.uint8),
        "v2": (v2.Compose([*on_tensors, v2.Normalize(mean, std)]), np.uint8),
        "gray": (v1.Compose([v1.Grayscale(), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize([0.5], [0.2])]), np.uint8),
        "erasing last": (v1.Compose([v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(mean, std), v1.RandomErasing(0)]),
                         np.float32),
        "unscaled": (v2.Compose([v2.ToImage(), v2.CenterCrop(32), v2.ToDtype(torch.float32), v2.Normalize(mean, std)]),
                     np.float32),
    }  # fmt: skip


def in_every_kind(folder: Path, images: list[Image.Image], labels: list[int]) -> dict[str, str]:
    """Write the same images as a folder of files, Parquet in one file and in several, a dataset of `save_to_disk`, and
    .npz with and without compression."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / "images" / f"class_{label}").mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / f"class_{label}" / f"{number}.png")
    values = [{"bytes": png(image), "path": None} for image in images]
    tables = [
        pa.table({"image": values[part], "row": labels[part], "label": labels[part]}) for part in (slice(4), slice(4, None))
    ]
    (folder / "parts").mkdir()
    pq.write_table(pa.concat_tables(tables), folder / "one.parquet")
    (folder / "saved").mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / "parts" / f"{number}.parquet")
        with pa.ipc.new_stream(folder / "saved" / f"data-{number}.arrow", table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": f"data-{number}.arrow"} for number in range(2)]}
    (folder / "saved" / "state.json").write_text(json.dumps(state))
    (folder / "saved" / "dataset_info.json").write_text("{}")
    arrays = {"images": np.stack([np.asarray(i.convert("L")) for i in images]), "labels": np.array(labels)}
    np.savez(folder / "a.npz", **arrays)
    np.savez_compressed(folder / "b.npz", **arrays)
    return {name: str(folder / name) for name in ("images", "one.parquet", "parts", "saved", "a.npz", "b.npz")}
