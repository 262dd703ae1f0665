"""Hostile sources of data: each is read right, or refused with a sentence that names the key, the place and the fault.

The first table has sources that must be refused, by what the message says; the second has sources that must be read, by
their labels, or by the labels and the first pixel of each image.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.io.progress import drain
from ray_soup.recipe import Data
from ray_soup.task.data import Examples, load_sources
from ray_soup.task.sources import check_sources
from tests.unit.task.images import as_tensor, png
from tests.unit.task.test_class_names import picture, write_folders

LARGE = np.arange(3 << 16, dtype=np.uint8).reshape(3, -1)
PICTURES = [png(picture(value)) for value in range(3)]


class Codes:
    """A preprocessing of texts: their first letter."""

    takes = "text"

    def __call__(self, text: str) -> np.ndarray:
        return np.array([[ord(text[0])]], dtype=np.uint8)


def load(spec: Path | str, preprocess: Any = as_tensor) -> Examples:
    data = Data(fit=str(spec))
    check_sources(data)
    return drain(load_sources(data, preprocess))["fit"]


# Writers: each returns the source


def last(*steps: Any) -> Any:
    """The last of some values: the steps that write a source, then its path."""
    return steps[-1]


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def npz(folder: Path, images: Any = None, labels: Any = (0, 1, 2), **more: Any) -> Path:
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2) if images is None else images
    np.savez(folder / "a.npz", images=images, labels=labels, **more)
    return folder / "a.npz"


def table(folder: Path, name: str = "a.parquet", **columns: Any) -> Path:
    columns = {"image": PICTURES, "label": [0, 1, 2], **columns}
    pq.write_table(pa.table({key: values for key, values in columns.items() if values is not None}), folder / name)
    return folder / name


def parts(folder: Path, *labels: Any) -> Path:
    (folder / "parts").mkdir()
    for number, some in enumerate(labels):
        table(folder / "parts", f"{number}.parquet", label=some)
    return folder / "parts"


def saved(folder: Path, state: Any = None, info: str = "{}", **columns: Any) -> Path:
    (folder / "saved").mkdir()
    found = pa.table({"image": PICTURES, "label": [0, 1, 2], **columns})
    with pa.ipc.new_stream(folder / "saved" / "data.arrow", found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    state = {"_data_files": [{"filename": "data.arrow"}]} if state is None else state
    (folder / "saved" / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    (folder / "saved" / "dataset_info.json").write_text(info)
    return folder / "saved"


def folders(folder: Path, *more: Callable[[Path], object]) -> Path:
    """A folder of the classes a, b and c, changed by `more`."""
    write_folders(folder / "set", "abc")
    for change in more:
        change(folder / "set")
    return folder / "set"


def changed(file: Path, change: Callable[[bytes], bytes]) -> Path:
    file.write_bytes(change(file.read_bytes()))
    return file


def bound(path: Path) -> None:
    """A socket, bound by a relative path because its length is limited."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(before)


def huge_png(width: int, height: int) -> bytes:
    """A PNG of black pixels that nobody could decode in memory: its header, and the beginning of its data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def jpeg(cut: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()[: -cut or None]


def with_two_labels(folder: Path) -> Path:
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64()), ("label", pa.int64())])
    pq.write_table(pa.Table.from_arrays([pa.array(PICTURES), pa.array([0, 1, 2]), pa.array([2, 1, 0])], schema=schema),
                   folder / "a.parquet")  # fmt: skip
    return folder / "a.parquet"


def not_utf8(*texts: bytes) -> pa.Array:
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(texts), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(texts))]
    )


def forged_npz(folder: Path, shape: str, data: bytes = b"\0" * 12) -> Path:
    """An .npz whose header of `images` states another shape than its data have."""
    npz(folder)
    with zipfile.ZipFile(folder / "b.npz", "w") as archive, zipfile.ZipFile(folder / "a.npz") as whole:
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        archive.writestr("images.npy", header + data)
        archive.writestr("labels.npy", whole.read("labels.npy"))
    return folder / "b.npz"


def flip_pixel(data: bytes) -> bytes:
    at = data.index(LARGE.tobytes()) + LARGE.nbytes // 2
    return data[:at] + b"\xff" + data[at + 1 :]


# Datasets of functions


class Items:
    def __init__(self, *items: Any, length: Any = None) -> None:
        self.items, self.length = items, length

    def __len__(self) -> Any:
        return len(self.items) if self.length is None else self.length

    def __getitem__(self, row: int) -> Any:
        item = self.items[row]
        return item() if callable(item) else item


def broken() -> None:
    raise KeyError("no such row")


ONE = (np.zeros((2, 2), np.float32), 1)
FUNCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (broken, r"raised KeyError.*in broken"),
    "exits": (lambda: exit(0), r"exit"),
    "nothing": (lambda: None, r"len\(\) of its dataset raised TypeError"),
    "a generator": (lambda: iter([ONE]), r"len\(\) of its dataset raised TypeError"),
    "wrong length": (lambda: Items(ONE, length=3), r"item 1 of its dataset raised IndexError"),
    "negative length": (lambda: Items(ONE, length=-1), r"len\(\) of its dataset raised ValueError"),
    "empty": (lambda: Items(), "0 inputs and 0 labels"),
    "item raises": (lambda: Items(ONE, broken), r"item 1 of its dataset raised KeyError"),
    "item exits": (lambda: Items(ONE, lambda: exit(0)), r"item 1 of its dataset tried to exit|item 1 .* SystemExit"),
    "one array": (lambda: Items(np.zeros(3)), r"item 0 of its dataset is a ndarray; expected"),
    "three values": (lambda: Items((*ONE, 2)), r"item 0 of its dataset is a tuple of 3; expected"),
    "a dict": (lambda: Items({"image": 1, "mask": 2}), r"has the entries image, mask; expected inputs and"),
    "ragged": (lambda: Items(ONE, (np.zeros((2, 3), np.float32), 1)), r"item 1 is float32 \[2, 3\], and that of item 0 is"),
    "other dtype": (lambda: Items(ONE, (np.zeros((2, 2)), 1)), r"item 1 is float64 \[2, 2\], and that of item 0 is float32"),
    "a text": (lambda: Items(("cat", 1)), r"the input of item 0 is a str of <U3; expected an array of numbers"),
    "ragged lists": (lambda: Items(([[1], [1, 2]], 1)), r"item 0 of its dataset, converted to arrays, raised ValueError"),
    "label 1.7": (lambda: Items(ONE, (ONE[0], 1.7)), r"the label of item 1 is '1\.7'; expected the number of a class"),
    "label nan": (lambda: Items((ONE[0], float("nan"))), r"the label of item 0 is 'nan'; expected"),
    "label of text": (lambda: Items((ONE[0], "1")), r"the label of item 0 is '1'; expected"),
    "one-hot label": (lambda: Items((ONE[0], [0, 1])), r"the label of item 0 is '\[0, 1\]'; expected"),
    "no label": (lambda: Items((ONE[0], None)), r"the label of item 0 is 'None'; expected"),
    "negative label": (lambda: Items((ONE[0], -1)), r"the label of item 0 is '-1'; expected"),
    "huge label": (lambda: Items((ONE[0], 2**70)), r"the label of item 0 is '1180591620717411303424'; expected"),
    "nan pixel": (lambda: Items(ONE, (ONE[0] * np.nan, 1)), "row 1 contains NaN or infinite values"),
}
CURRENT: list[Callable[[], Any]] = []


def dataset() -> Any:
    return CURRENT[-1]()


@pytest.mark.parametrize("fault", FUNCTIONS)
def test_a_function_that_fails_is_refused_by_name(fault: str) -> None:
    make, said = FUNCTIONS[fault]
    CURRENT.append(make)
    spec = f"{__name__}:dataset"
    with pytest.raises(RecipeError, match=rf"(?s)^data\.fit: {re.escape(spec)}.*{said}"):
        load(spec)


def test_a_function_may_return_tensors_pictures_and_integral_labels() -> None:
    import torch

    CURRENT.append(lambda: [(torch.ones(2, 2, requires_grad=True), torch.tensor([1])), (torch.zeros(2, 2), 2.0),
                            (np.zeros((2, 2), np.float32), np.uint8(3)), (torch.zeros(2, 2), True)])  # fmt: skip
    found = load(f"{__name__}:dataset")
    assert found.labels.tolist() == [1, 2, 3, 1]
    assert found.images.dtype == np.float32
    assert found.images[:, 0, 0].tolist() == [1, 0, 0, 0]
    CURRENT.append(lambda: [(np.full((2, 2), 3, ">f4"), 0)])
    found = load(f"{__name__}:dataset")
    assert found.images.dtype.isnative
    assert found.images.tolist() == [[[3, 3], [3, 3]]]


# Files


def refused() -> dict[str, tuple[Callable[[Path], Any], str]]:
    """The source by the name of its fault, and what the message says."""
    floats = np.ones((3, 2), np.float32)
    stamps = np.array(["2024-01-01"] * 3, "datetime64[s]")
    records = np.zeros(3, [("a", "i4"), ("b", "f4")])
    return {
        # .npz
        "images of text": (lambda f: npz(f, np.array(["a", "b", "c"])), r"images are <U1 \[3\]; expected an array"),
        "images of bytes": (lambda f: npz(f, np.array([b"a", b"b", b"c"])), r"images are \|S1 \[3\]; expected an array"),
        "images of dates": (lambda f: npz(f, stamps), r"images are datetime64\[s\] \[3\]; expected"),
        "images of records": (lambda f: npz(f, records), r"images are \[\('a', '<i4'\), .*; expected an array"),
        "images of objects": (lambda f: npz(f, np.array([None, 1, "x"])), r"images are object \[3\]; expected an array"),
        "complex images": (lambda f: npz(f, floats + 1j), r"images are complex64 \[3, 2\]; expected an array"),
        "images of 128 bits": (lambda f: npz(f, np.ones((3, 2), np.longdouble)), r"images are float128 \[3, 2\]; expected"),
        "one number": (lambda f: npz(f, np.float32(1)), r"images are float32 \[\]; expected an array \[n, \.\.\.\]"),
        "nan": (lambda f: npz(f, floats * [[1], [np.nan], [1]]), "row 1 contains NaN or infinite"),
        "infinity, compressed": (
            lambda f: last(
                np.savez_compressed(f / "a.npz", images=floats * [[1], [1], [np.inf]], labels=[0, 1, 2]), f / "a.npz"
            ),
            "row 2 contains NaN or infinite",
        ),
        "infinity, column-major": (lambda f: npz(f, np.asfortranarray(floats * [[1], [-np.inf], [1]])), "row 1 contains"),
        "labels of floats": (
            lambda f: npz(f, labels=np.array([0, 1.7, 2])), r"labels are float64 \[3\]; expected int64 \[n\]",
        ),
        "labels of text": (lambda f: npz(f, labels=np.array(["a", "b", "c"])), r"labels are <U1 \[3\]; expected int64"),
        "labels of bool": (lambda f: npz(f, labels=np.array([True, False, True])), r"labels are bool \[3\]; expected int64"),
        "labels of dates": (lambda f: npz(f, labels=stamps), r"labels are datetime64\[s\] \[3\]; expected int64"),
        "labels of times": (lambda f: npz(f, labels=stamps - stamps[0]), r"labels are timedelta64\[s\] \[3\]; expected"),
        "labels of records": (lambda f: npz(f, labels=records), r"labels are .* \[3\]; expected int64 \[n\]"),
        "labels of objects": (lambda f: npz(f, labels=np.array([None, 1, 2])), r"labels are object \[3\]; expected int64"),
        "labels in a column": (lambda f: npz(f, labels=np.zeros((3, 1), int)), r"labels are int64 \[3, 1\]; expected int64"),
        "one label": (lambda f: npz(f, labels=np.int64(3)), r"labels are int64 \[\]; expected int64 \[n\]"),
        "negative labels": (lambda f: npz(f, labels=[0, 1, -1]), r"label -1 at row 2 \(1 out of range\)"),
        "labels beyond int64": (
            lambda f: npz(f, labels=np.array([0, 2**63, 2], np.uint64)), "label 9223372036854775808 at row 1",
        ),
        "fewer labels": (lambda f: npz(f, labels=[0, 1]), "3 inputs and 2 labels; expected one label per input"),
        "no examples": (lambda f: npz(f, np.zeros((0, 2)), np.zeros(0, int)), "0 inputs and 0 labels"),
        "truncated npz": (lambda f: changed(npz(f), lambda d: d[:-30]), r"cannot be read as \.npz"),
        "a flipped pixel": (lambda f: changed(npz(f, LARGE), flip_pixel), "images do not match their checksum"),
        "an array as .npz": (lambda f: last(np.save(f / "a.npy", [1]), (f / "a.npy").rename(f / "a.npz")), r"as \.npz"),
        "more elements than bytes": (lambda f: forged_npz(f, "(3, 2, 3)"), "has 12 bytes instead of 18 for uint8"),
        "a negative shape": (lambda f: forged_npz(f, "(3, -2)"), r"cannot be read as \.npz"),
        "an endless shape": (lambda f: forged_npz(f, f"(3, {10**30})"), r"cannot be read as \.npz"),
        "two arrays of one name": (
            lambda f: last(zipfile.ZipFile(npz(f), "a").writestr("images.npy", b""), f / "a.npz"),
            r"expected the arrays 'images' and 'labels', once each",
        ),
        # special files
        "a fifo": (
            lambda f: last(os.mkfifo(f / "a.npz"), f / "a.npz"), "folder, FIFO, socket or device; expected a regular",
        ),
        "a fifo as Parquet": (lambda f: last(os.mkfifo(f / "a.parquet"), f / "a.parquet"), "FIFO, socket or device"),
        "a device": (lambda f: last((f / "a.npz").symlink_to("/dev/zero"), f / "a.npz"), "FIFO, socket or device"),
        "a socket": (lambda f: last(bound(f / "a.npz"), f / "a.npz"), "FIFO, socket or device"),
        "a broken link": (lambda f: last((f / "a.npz").symlink_to("nothing"), f / "a.npz"), "cannot be read"),
        "a missing file": (lambda f: f / "a.npz", "does not exist on"),
        "an unknown kind": (lambda f: written(f / "a.csv", "a,b"), "is not a supported source"),
        "an empty folder": (lambda f: last((f / "set").mkdir(), f / "set"), "contains no supported data"),
        # class folders
        "a broken link to an image": (
            lambda f: folders(f, lambda s: (s / "a" / "1.png").symlink_to("nothing")), "a/1.png is a link to nothing",
        ),
        "a broken link to a folder": (lambda f: folders(f, lambda s: (s / "d").symlink_to("nothing")), "set/d is a link to"),
        "a fifo as image": (lambda f: folders(f, lambda s: os.mkfifo(s / "b" / "1.png")), "b/1.png is a FIFO, socket or"),
        "a socket as image": (lambda f: folders(f, lambda s: bound(s / "b" / "1.png")), "b/1.png is a FIFO, socket or"),
        "two names of one class": (
            lambda f: folders(f, lambda s: (s / "d").symlink_to("a")), "are the same folder, by a link",
        ),
        "a class in another": (
            lambda f: folders(f, lambda s: (s / "a" / "more").symlink_to("../c")), "of the folder c are the same folder",
        ),
        "a truncated image": (
            lambda f: folders(f, lambda s: changed(s / "c" / "0.png", lambda d: d[:45])),
            r"row 2 \(c/0\.png\) cannot be decoded",
        ),
        "a text as image": (
            lambda f: folders(f, lambda s: (s / "b" / "0.png").write_text("x")), r"row 1 \(b/0\.png\) cannot be decoded",
        ),
        "an empty image": (
            lambda f: folders(f, lambda s: (s / "b" / "0.png").write_bytes(b"")), r"row 1 \(b/0\.png\) cannot be decoded",
        ),
        "a huge image": (
            lambda f: folders(f, lambda s: (s / "b" / "0.png").write_bytes(huge_png(50_000, 50_000))),
            r"row 1 \(b/0\.png\) cannot be decoded.*pixels",
        ),
        "a large image": (
            lambda f: folders(f, lambda s: (s / "b" / "0.png").write_bytes(huge_png(10_000, 10_000))),
            r"row 1 \(b/0\.png\) cannot be decoded.*pixels",
        ),
        "splits of images": (
            lambda f: last(
                *(write_folders(f / "set" / name, "ab", offset=n) for n, name in enumerate(("train", "test"))), f / "set"
            ),
            r"contains the folders test, train, of which test, train seem to be splits\. Choose one, as in .*set/train, or "
            r"rename a folder that is a class\.",
        ),
        "splits without classes": (
            lambda f: write_folders(f / "set", ("train", "val")), "splits, but without a folder per class",
        ),
        # Parquet
        "text as Parquet": (lambda f: written(f / "a.parquet", "hello" * 9), "cannot be read as Parquet"),
        "an empty Parquet file": (lambda f: written(f / "a.parquet", ""), "cannot be read as Parquet"),
        "a Git LFS pointer": (
            lambda f: written(f / "a.parquet", "version https://git-lfs.github.com/spec/v1\n"),
            "run `git lfs pull`",
        ),
        "truncated Parquet": (lambda f: changed(table(f), lambda d: d[:-20]), r"a\.parquet cannot be read as Parquet"),
        "no rows": (
            lambda f: table(f, image=pa.array([], pa.binary()), label=pa.array([], pa.int64())), "0 inputs and 0 labels",
        ),
        "two columns of one name": (with_two_labels, r"a\.parquet has 2 columns named 'label'"),
        "no labels": (lambda f: table(f, label=None), "expected one column of image bytes and one of integer labels"),
        "float labels": (lambda f: table(f, label=[0.0, 1.7, 2.0]), "one of integer labels"),
        "text labels": (lambda f: table(f, label=["a", "b", "c"]), "one of integer labels"),
        "dictionary of text labels": (
            lambda f: table(f, label=pa.array(["a", "b", "c"]).dictionary_encode()), "one of integer labels",
        ),
        "a null label": (lambda f: table(f, label=[0, None, 2]), r"row 1 of a\.parquet has no label: 'label' is null"),
        "a null label in a second file": (lambda f: parts(f, [0, 1, 2], [0, 1, None]), r"row 2 of 1\.parquet has no label"),
        "a negative label": (lambda f: parts(f, [0, 1, 2], [0, -1, 2]), r"label -1 at row 1 of 1\.parquet"),
        "a label beyond int64": (
            lambda f: table(f, label=pa.array([0, 2**63, 2], pa.uint64())), "label 9223372036854775808 at row 1",
        ),
        "a null image": (
            lambda f: table(f, image=[PICTURES[0], None, PICTURES[2]]), r"row 1 of a\.parquet, column 'image': null",
        ),
        "a null struct": (
            lambda f: table(f, image=[{"bytes": PICTURES[0], "path": ""}, None, {"bytes": b"", "path": ""}]),
            r"row 1 of a\.parquet, column 'image': null",
        ),
        "image bytes that are a path": (
            lambda f: table(f, image=[PICTURES[0], b"images/1.png", PICTURES[2]]), "example at row 1 cannot be decoded",
        ),
        "a path outside": (
            lambda f: table(f, image=[{"bytes": None, "path": "/etc/passwd"}] * 3), "path '/etc/passwd' is not a file in",
        ),
        "a path that climbs": (
            lambda f: last(
                (f / "in").mkdir(), (f / "0.png").write_bytes(PICTURES[0]),
                table(f / "in", image=[{"bytes": None, "path": "../0.png"}] * 3),
            ),
            r"its path '\.\./0\.png' is not a file in",
        ),
        "a URL as path": (
            lambda f: table(f, image=[{"bytes": None, "path": "http://a/b.png"}] * 3), "'http://a/b.png' is not a file in",
        ),
        "a broken image": (
            lambda f: table(f, image=[*PICTURES[:2], PICTURES[2][:40]]), "example at row 2 cannot be decoded",
        ),
        "a truncated JPEG": (lambda f: table(f, image=[PICTURES[0], jpeg(cut=900), PICTURES[2]]), "row 1 cannot be decoded"),
        "a huge image in Parquet": (
            lambda f: table(f, image=[*PICTURES[:2], huge_png(50_000, 50_000)]), "row 2 cannot be decoded.*pixels",
        ),
        "images of other sizes": (
            lambda f: table(f, image=[*PICTURES[:2], png(Image.new("L", (5, 4)))]),
            r"row 2 becomes uint8 \[4, 5\] and row 0 uint8 \[4, 4\]",
        ),
        "a link to the same file": (
            lambda f: last(parts(f, [0, 1, 2]), (f / "parts" / "1.parquet").symlink_to("0.parquet"), f / "parts"),
            "are the same file",
        ),
        "a folder with a fifo": (
            lambda f: last(parts(f, [0, 1, 2]), os.mkfifo(f / "parts" / "1.parquet"), f / "parts"), "is a FIFO",
        ),
        "splits of Parquet": (
            lambda f: last(*(table(f, f"{name}-00000-of-00001.parquet") for name in ("train", "test")), f),
            r"several splits: test \(1 file\), train \(1 file\)\. Choose one, as in .*/train-00000-of-00001\.parquet",
        ),
        "splits in data/": (
            lambda f: last(
                (f / "data").mkdir(),
                *(table(f / "data", f"{s}-0000{n}-of-00002.parquet") for s in ("test", "validation") for n in range(2)), f,
            ),
            r"contains several splits: .* as in .*/data/validation-0000\*\.parquet",
        ),
        "configurations": (
            lambda f: last(
                *((f / name).mkdir() or table(f / name) for name in ("en", "fr")),
                written(f / "README.md", "---\nconfigs:\n- config_name: en\n- config_name: fr\n---\n"), f,
            ),
            "contains the configurations en, fr",
        ),
        "a pattern of several splits": (
            lambda f: last(table(f, "train-0.parquet"), table(f, "test-0.parquet"), f / "*.parquet"),
            r"several splits: test \(1 file\), train \(1 file\)\. Choose one, as in /.*/train-0\.parquet",
        ),
        "a pattern without files": (lambda f: f / "test-*.parquet", "does not exist on"),
        "a pattern of other files": (lambda f: last(npz(f), f / "*"), r"a\.npz is not a Parquet file"),
        # save_to_disk
        "an empty state.json": (lambda f: saved(f, ""), r"state\.json cannot be read as JSON"),
        "a list as state.json": (lambda f: saved(f, []), r"state\.json is a list; expected a JSON object"),
        "deep state.json": (lambda f: saved(f, "[" * 200_000), r"state\.json cannot be read as JSON"),
        "a fifo as state.json": (
            lambda f: last(os.remove(saved(f) / "state.json"), os.mkfifo(f / "saved" / "state.json"), f / "saved"),
            "state.json is a folder, FIFO, socket or device",
        ),
        "no data files": (lambda f: saved(f, {"_data_files": []}), r"state\.json names no data files"),
        "data files of another type": (lambda f: saved(f, {"_data_files": [7, {"filename": None}]}), "names no data files"),
        "data files as text": (lambda f: saved(f, {"_data_files": "data.arrow"}), "names no data files"),
        "data files outside": (
            lambda f: saved(f, {"_data_files": [{"filename": "../a.arrow"}]}), r"the file \.\./a\.arrow, which is not in",
        ),
        "a missing data file": (lambda f: saved(f, {"_data_files": [{"filename": "b.arrow"}]}), r"b\.arrow cannot be read"),
        "a data file twice": (lambda f: saved(f, {"_data_files": [{"filename": "data.arrow"}] * 2}), "data.arrow twice"),
        "a selection of rows": (
            lambda f: saved(f, {"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": [1]}), "is a selection",
        ),
        "a broken dataset_info.json": (lambda f: saved(f, info="{"), r"dataset_info\.json cannot be read as JSON"),
        "a cut stream": (
            lambda f: changed(saved(f) / "data.arrow", lambda d: d[: len(d) // 2]).parent,
            r"data\.arrow cannot be read as Arrow",
        ),
        "a stream without its last rows": (
            lambda f: changed(saved(f) / "data.arrow", lambda d: d[:-8]).parent, "has no end: the file is truncated",
        ),
        "text as Arrow": (
            lambda f: changed(saved(f) / "data.arrow", lambda d: b"x" * 99).parent, r"data\.arrow cannot be read as Arrow",
        ),
        "labels without a name": (
            lambda f: saved(f, info='{"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}'),
            r"label 2 at row 2; the column 'label' has 2 names of classes",
        ),
        "a broken dataset_dict.json": (
            lambda f: last(written(f / "dataset_dict.json", "[]"), f), r"dataset_dict\.json is a list; expected",
        ),
        "an empty dataset_dict.json": (
            lambda f: last(written(f / "dataset_dict.json", "{}"), f), r"dataset_dict\.json names no splits",
        ),
        "a split outside": (
            lambda f: last(written(f / "dataset_dict.json", '{"splits": ["../a"]}'), f), "names no splits",
        ),
    }  # fmt: skip


REFUSED = refused()


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.timeout(60)
def test_a_hostile_source_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    write, said = REFUSED[fault]
    spec = write(tmp_path)
    with pytest.raises(RecipeError, match=rf"(?s)^data\.fit: {re.escape(str(spec))}: .*{said}") as error:
        load(spec)
    assert str(error.value).endswith(".")


TEXTS: dict[str, tuple[Any, str]] = {
    "not UTF-8": (
        not_utf8(b"one", b"\xff\xfe", b"two"),
        r"rows 0 to 2 of a\.parquet, column 'text', are damaged or not UTF-8",
    ),
    "a null": (["one", None, "two"], r"row 1 of a\.parquet, column 'text': null"),
    "an empty text": (["one", "", "two"], r"the example at row 1 cannot be decoded \(IndexError"),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_hostile_text_is_refused_by_row(tmp_path: Path, fault: str) -> None:
    texts, said = TEXTS[fault]
    with pytest.raises(RecipeError, match=rf"^data\.fit: .*a\.parquet: {said}"):
        load(table(tmp_path, image=None, text=texts), Codes())


def everything(examples: Examples) -> tuple[list[int], list[int]]:
    return examples.labels.tolist(), examples.images.reshape(len(examples), -1)[:, 0].tolist()


def linked_into_itself(folder: Path) -> Path:
    def link(path: Path) -> None:
        (path / "a" / "self").symlink_to(".")
        (path / "b" / "parent").symlink_to("..")
        (path / "c" / "above").symlink_to(path.parent)
        (path / "loop").symlink_to(".")

    return folders(folder, link)


def linked_outside(folder: Path) -> Path:
    (folder / "outside" / "deep").mkdir(parents=True)
    picture(0, 9).save(folder / "outside" / "deep" / "0.png")
    return folders(
        folder,
        lambda s: (s / "a" / "more").symlink_to(folder / "outside"),
        lambda s: (s / "a" / "twice").symlink_to(folder / "outside" / "deep"),
    )


def with_paths(folder: Path) -> Path:
    (folder / "images").mkdir()
    for value, image in enumerate(PICTURES):
        (folder / "images" / f"{value}.png").write_bytes(image)
    paths = [{"bytes": None if value else PICTURES[0], "path": f"images/{value}.png"} for value in range(3)]
    return table(folder, image=paths)


READ: dict[str, Callable[[Path], Any]] = {
    "big-endian arrays": lambda f: npz(f, np.arange(12, dtype=">f8").reshape(3, 4) // 4, np.array([0, 1, 2], ">i4")),
    "column-major arrays": lambda f: npz(f, np.asfortranarray(np.arange(12.0).reshape(3, 4) // 4)),
    "bool images": lambda f: npz(f, np.eye(3, dtype=bool)[[1, 0, 0]][:2], [0, 1]),
    "uint64 labels": lambda f: npz(f, np.arange(3.0)[:, None], np.arange(3, dtype=np.uint64)),
    "a folder linked into itself": linked_into_itself,
    "a link to a class outside": lambda f: last(
        folders(f), (f / "set" / "c").rename(f / "out"), (f / "set" / "c").symlink_to(f / "out"), f / "set"
    ),
    "one split of images": lambda f: last(write_folders(f / "set" / "train", "abc"), f / "set"),
    "int32 labels beside int64": lambda f: last(
        (f / "parts").mkdir(),
        *(table(f / "parts", f"{n}.parquet", image=PICTURES[n : n + 1], label=pa.array([n], dtype))
          for n, dtype in enumerate((pa.int32(), pa.int64(), pa.uint8()))), f / "parts",
    ),
    "dictionary labels": lambda f: table(f, label=pa.array([0, 1, 2], pa.int32()).dictionary_encode()),
    "large binary images": lambda f: table(f, image=pa.array(PICTURES, pa.large_binary())),
    "dictionary images": lambda f: table(f, image=pa.array(PICTURES).dictionary_encode()),
    "images as paths": with_paths,
    "a pattern": lambda f: last(table(f, "train-0.parquet"), table(f, "test-0.parquet"), f / "test-*.parquet"),
    "one split of Parquet": lambda f: last(
        (f / "data").mkdir(), table(f / "data", "test-00000-of-00001.parquet"), f
    ),
    "a saved dataset": saved,
    "Parquet of other codecs": lambda f: last(
        pq.write_table(pq.read_table(table(f)), f / "b.parquet", compression="zstd", write_statistics=False),
        f / "b.parquet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
@pytest.mark.timeout(60)
def test_an_unusual_source_is_read_right(tmp_path: Path, kind: str) -> None:
    labels, values = everything(load(READ[kind](tmp_path)))
    assert labels == values
    assert labels == list(range(len(labels)))


def test_a_folder_that_is_linked_twice_counts_once(tmp_path: Path) -> None:
    found = load(linked_outside(tmp_path))
    assert everything(found) == ([0, 0, 1, 2], [0, 0, 1, 2])
    assert "links to a folder that contains them, or was read already" in found.notes[0]


def test_texts_of_a_dictionary_are_read_right(tmp_path: Path) -> None:
    texts = pa.array(["a", "b", "a"]).dictionary_encode()
    assert everything(load(table(tmp_path, image=None, text=texts), Codes())) == ([0, 1, 2], [97, 98, 97])


def test_an_image_that_a_path_names_is_in_the_identity(tmp_path: Path) -> None:
    """A changed file of a table that holds paths is decoded, not taken from the cache."""
    spec = with_paths(tmp_path)
    assert everything(load(spec))[1] == [0, 1, 2]
    (tmp_path / "images" / "1.png").write_bytes(png(picture(77)))
    assert everything(load(spec))[1] == [0, 77, 2]


def to_rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image).copy()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "PA"])
def test_images_of_every_mode_are_converted_as_by_torchvision(tmp_path: Path, mode: str) -> None:
    from torchvision.datasets import ImageFolder

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == "PA":
        image = image.convert("P")
        image.info["transparency"] = 3
    else:
        image = image.convert(mode)
    (tmp_path / "set" / "a").mkdir(parents=True)
    image.save(tmp_path / "set" / "a" / ("0.tiff" if mode == "CMYK" else "0.png"))
    np.testing.assert_array_equal(load(tmp_path / "set", to_rgb).images[0], np.asarray(ImageFolder(tmp_path / "set")[0][0]))


def nan_for_two(image: Image.Image) -> np.ndarray:
    value = float(np.asarray(image.convert("L"))[0, 0])
    return np.array([np.nan if value == 2 else value])


PREPROCESS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "raises": (lambda image: {}["x"], r"row 0 \(a/0\.png\) cannot be decoded \(KeyError: 'x'\)"),
    "exits": (lambda image: exit(0), r"row 0 \(a/0\.png\) cannot be decoded \(SystemExit"),
    "text": (lambda image: "cat", r"row 0 \(a/0\.png\) becomes <U3 \[\]; expected an array of numbers"),
    "objects": (lambda image: None, r"becomes object \[\]; expected an array of numbers"),
    "nan": (nan_for_two, "row 2 contains NaN or infinite values"),
}


@pytest.mark.parametrize("fault", PREPROCESS)
def test_a_preprocessing_that_fails_is_refused_by_row(tmp_path: Path, fault: str) -> None:
    preprocess, said = PREPROCESS[fault]
    with pytest.raises(RecipeError, match=rf"^data\.fit: .*set: .*{said}"):
        load(folders(tmp_path), preprocess)


def test_labels_are_checked_before_anything_is_decoded(tmp_path: Path) -> None:
    """The check of the model sees the labels and one input of each source while nothing else has been decoded."""
    decoded: list[int] = []

    def count(image: Any) -> Any:
        decoded.append(1)
        return as_tensor(image)

    def check(first: dict[str, Examples]) -> None:
        assert {name: len(examples) for name, examples in first.items()} == {"fit": 3, "test": 300}
        assert [len(examples.images) for examples in first.values()] == [1, 1]
        for examples in first.values():
            examples.check_labels(300)

    many: Sequence[bytes] = [png(picture(value % 256, value // 256)) for value in range(300)]
    data = {
        "fit": str(folders(tmp_path)),
        "test": str(table(tmp_path, image=list(many), label=[*range(299), 700])),
    }
    with pytest.raises(RecipeError, match=r"data\.fit: .*class folders of the data have 3 names"):
        drain(load_sources(Data(**data), count, check))
    data["fit"] = str(table(tmp_path, "b.parquet"))
    with pytest.raises(RecipeError, match=r"data\.test: .*a\.parquet: label 700 at row 299 \(1 out of range\)"):
        drain(load_sources(Data(**data), count, check))
    assert len(decoded) <= 8
