"""A checkpoint that somebody built or damaged reads as what torch loads, or is refused: no other numbers, no crash."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError
from ray_soup.io import ingredient as ingredient_module
from ray_soup.io import mapped
from ray_soup.io.ingredient import check_unchanged, open_ingredient
from tests.conftest import ROOT

STATE = {"a.weight": torch.arange(40.0).reshape(5, 8), "a.bias": torch.arange(7.0), "b.weight": torch.full((9,), 3.0)}


def saved(path: Path, content: Any = None) -> Path:
    torch.save(STATE if content is None else content, path)
    return path


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again with other records, unaligned as zipfile writes them."""
    content = change(records(path))
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def assert_reads_state(path: Path) -> None:
    ingredient = open_ingredient(str(path))
    for name, tensor in STATE.items():
        read = ingredient.read(name)
        assert read.data_ptr() % read.itemsize == 0
        assert torch.equal(read, tensor.flatten())


@pytest.mark.parametrize("change", ["same", "reversed", "data last"])
def test_records_may_lie_anywhere(tmp_path: Path, change: str) -> None:
    path = saved(tmp_path / "a.pt")
    orders: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
        "same": dict,
        "reversed": lambda r: dict(reversed(r.items())),
        "data last": lambda r: dict(sorted(r.items(), key=lambda item: "/data/" in item[0])),
    }
    rewritten(path, orders[change])
    assert_reads_state(path)


@pytest.mark.parametrize("alignment", [1, 3, 7, 4096])
def test_storages_may_have_any_alignment(tmp_path: Path, alignment: int) -> None:
    from torch.utils.serialization import config

    with config.patch({"save.storage_alignment": alignment}):
        saved(tmp_path / "a.pt")
    assert_reads_state(tmp_path / "a.pt")


def test_a_safetensors_file_may_have_any_alignment(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)  # an odd length
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert_reads_state(tmp_path / "a.safetensors")


def with_record(name: str, data: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda r: {n: data if n.endswith(f"/{name}") else d for n, d in r.items()}


REFUSED = {
    "a short record": (with_record("data/1", b"123"), r"record data/1 of the tensor a\.bias has 3 bytes; expected 28"),
    "a missing record": (lambda r: {n: d for n, d in r.items() if not n.endswith("data/2")}, r"data/2 .* is missing"),
    "no pickle": (lambda r: {n: d for n, d in r.items() if not n.endswith(".pkl")}, r"without a record data\.pkl"),
    "big-endian": (with_record("byteorder", b"big"), r"byte order b'big'; expected b'little'"),
    "names that differ in case": (lambda r: {**r, "a/DATA/0": b"0" * 160}, "two records have one name"),
    "another folder": (lambda r: {**r, "b/data/0": b"0" * 160}, "is not a record of 'a/'"),
    "a pickle that ends early": (lambda r: with_record("data.pkl", r["a/data.pkl"][:90])(r), "its pickle is broken at byte"),
    "a large pickle": (with_record("data.pkl", bytes(65 << 20)), "it has .* expected at most 67,108,864"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_damaged_archive_is_refused(tmp_path: Path, fault: str) -> None:
    path = saved(tmp_path / "a.pt")
    change, message = REFUSED[fault]
    rewritten(path, change)
    with pytest.raises(IngredientError, match=rf"a\.pt .*{message}"):
        open_ingredient(str(path))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.zeros(1000)})
    rewritten(path, dict, zipfile.ZIP_DEFLATED)
    with pytest.raises(IngredientError, match=r"is compressed; expected stored records"):
        open_ingredient(str(path))


def directory_of(data: bytes) -> dict[bytes, int]:
    """Return where the entry of each record begins in the list of records."""
    entries, at = {}, data.index(b"PK\1\2")
    while data[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack("<HHH", data[at + 28 : at + 34])
        entries[data[at + 46 : at + 46 + lengths[0]]] = at
        at += 46 + sum(lengths)
    return entries


def test_a_record_that_torch_takes_for_a_folder_is_refused(tmp_path: Path) -> None:
    """One bit: torch.load reads nothing from the record then, and the tensor has whatever lay in memory."""
    path = saved(tmp_path / "a.pt")
    rewritten(path, dict)
    data = bytearray(path.read_bytes())
    data[directory_of(bytes(data))[b"a/data/1"] + 38] |= 0x10
    path.write_bytes(data)
    with pytest.raises(IngredientError, match=r"a\.pt .*data/1 is marked as a folder; expected a file"):
        open_ingredient(str(path))


def test_two_records_in_one_place_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt")
    rewritten(path, dict)
    data = bytearray(path.read_bytes())
    entries = directory_of(bytes(data))
    first, second = entries[b"a/data/0"], entries[b"a/data/1"]
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    with pytest.raises(IngredientError, match=r"a\.pt .*damaged"):
        open_ingredient(str(path))


@pytest.mark.parametrize("extra", ["before", "after", "comment"])
def test_an_archive_within_another_file_is_refused(tmp_path: Path, extra: str) -> None:
    path = saved(tmp_path / "a.pt")
    data = path.read_bytes()
    other = saved(tmp_path / "b.pt", {"a.weight": torch.zeros(5, 8)}).read_bytes()
    comment = data[:-2] + struct.pack("<H", len(other)) + other if len(other) < 1 << 16 else data
    path.write_bytes({"before": other + data, "after": data + b"x" * 30, "comment": comment}[extra])
    if extra == "comment":  # the last archive in the file is whole: but its offsets count from its own beginning
        assert data in path.read_bytes() or data[:-2] in path.read_bytes()
    with pytest.raises(IngredientError, match=r"a\.pt .*damaged"):
        open_ingredient(str(path))


def tuples(depth: int) -> bytes:
    return b"}" + b")" + b"\x85" * depth + b"Ns."


BOMBS = {
    "bytearray(4e9)": b"cbuiltins\nbytearray\n\x8a\x05\x00\x28\x6b\xee\x00\x85R.",
    "UntypedStorage(1e12)": b"ctorch.storage\nUntypedStorage\n\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85R.",
    "FloatTensor(1e5, 1e5)": b"ctorch\nFloatTensor\nJ\xa0\x86\x01\x00J\xa0\x86\x01\x00\x86R.",
    "rebuilt by bytearray": b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nctorch\nTensor\n"
    b"\x8a\x05\x00\x28\x6b\xee\x00\x85NtR.",
    "encode doubles": b"X\x04\x00\x00\x00aaaa" + b"q\x000c_codecs\nencode\nh\x00X\x03\x00\x00\x00hex\x86R" * 2 + b".",
    "deep tuple as a key": tuples(1_000_000),
    "wide tuple as a key": b"}" + b")" + b"q\x00h\x00h\x00\x87" * 40 + b"Ns.",
    "sets": b"(" + b"\x8f" * 1_100_000 + b"t.",
    "negative storage": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    b"J\xff\xff\xff\xfftQ.",
    "huge memo": b"Nr\xff\xff\xff\x7f.",
    "no stop": b"N" * 100,
    "a class in the pickle": b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_asks_for_too_much_is_refused_before_torch_runs_it(tmp_path: Path, bomb: str) -> None:
    path = saved(tmp_path / "a.pt")
    rewritten(path, with_record("data.pkl", b"\x80\x02" + BOMBS[bomb]))
    peak, now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, psutil.Process().memory_info().rss >> 10  # KB
    with pytest.raises(IngredientError, match=r"a\.pt "):
        open_ingredient(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < max(peak + 1, now + (1 << 20))  # other tests had a peak too


@pytest.mark.parametrize("extra", [tuple(f"n{i:08d}" for i in range(21_841)), "x" * 40_000_000])
def test_what_large_checkpoints_hold_beside_their_tensors_is_no_damage(tmp_path: Path, extra: Any) -> None:
    assert_reads_state(saved(tmp_path / "a.pt", {"state_dict": STATE, "meta": {"CLASSES": extra}}))


def test_what_is_too_large_is_refused_by_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_soup.io import torch_pickle

    path = saved(tmp_path / "a.pt", {"state_dict": STATE, "log": [[1], [2], [3]]})
    for limit, what in (
        ("MOST_CONTAINERS", "lists and dictionaries"),
        ("MOST_OPERATIONS", "values and steps"),
        ("MOST_COPIED", "values in copies and keys"),
    ):
        with monkeypatch.context() as small:
            small.setattr(torch_pickle, limit, 3)
            with pytest.raises(IngredientError, match=rf"not opened: it has more than 3 {what}\. Save"):
                open_ingredient(str(path))


def child(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n" + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


def test_flipped_and_cut_files_read_as_torch_loads_them_or_are_refused(tmp_path: Path) -> None:
    """A bit is flipped in every second byte, and the file is cut at every 7th."""
    saved(tmp_path / "a.pt", {"w": torch.arange(3.0)})
    save_file({"w": torch.arange(3.0)}, tmp_path / "a.safetensors")
    script = """
        import sys, warnings, torch
        from pathlib import Path
        from safetensors.torch import load_file
        from ray_soup.errors import SoupError
        from ray_soup.io.ingredient import open_ingredient
        warnings.simplefilter("ignore")
        for name in ("a.pt", "a.safetensors"):
            path = Path(sys.argv[1]) / name
            good, right, refused = path.read_bytes(), 0, 0
            flipped = [bytes([*good[:i], good[i] ^ (1 << i % 8), *good[i + 1 :]]) for i in range(0, len(good), 2)]
            for data in [*flipped, *(good[:i] for i in range(0, len(good), 7))]:
                path.unlink()
                path.write_bytes(data)
                try:
                    ingredient = open_ingredient(str(path))
                    read = {n: ingredient.read(n) for n in ingredient.tensors}
                except SoupError as error:
                    assert name in str(error), error
                    refused += 1
                    continue
                safe = name.endswith("safetensors")
                truth = load_file(path) if safe else torch.load(path, "cpu", weights_only=True, mmap=True)
                for n, tensor in read.items():
                    assert torch.equal(tensor.view(torch.uint8), truth[n].reshape(-1).view(torch.uint8)), (name, data)
                right += 1
            print(name, right, refused)
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss has the parent's
        assert int(peak.split()[1]) < 2 << 20, peak
    """
    done = child(script, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 2


# Files that change while they are in use


def test_a_file_that_is_replaced_rewritten_or_removed_is_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for what in ("replaced", "rewritten", "removed", "cut"):
        save_file({"a": torch.zeros(4000)}, path)
        save_file({"a": torch.ones(4000)}, other)
        ingredient = open_ingredient(str(path))
        assert ingredient.read("a", 0, 10).sum() == 0
        check_unchanged([ingredient])
        time.sleep(0.02)  # the clock of a file system ticks every 10 ms or less often
        if what == "replaced":
            other.replace(path)
        elif what == "removed":
            path.unlink()
        else:
            path.write_bytes(other.read_bytes() if what == "rewritten" else other.read_bytes()[:9000])
        with pytest.raises(IngredientError, match=r"a\.safetensors (changed|was replaced|was removed)"):
            check_unchanged([ingredient])
        ingredient.close()
        with pytest.raises(IngredientError, match=r"a\.safetensors (changed|was removed)"):
            ingredient.read("a")
        path.unlink(missing_ok=True)


def test_a_file_may_get_another_number_while_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ingredient = open_ingredient(str(saved(tmp_path / "a.pt")))

    def renumbered(file: Any) -> mapped.Version:  # as sshfs does
        return version_of(file)._replace(inode=1, device=1)

    version_of = mapped.version_of
    for module in (mapped, ingredient_module):
        monkeypatch.setattr(module, "version_of", renumbered)
    check_unchanged([ingredient])
    assert torch.equal(ingredient.read("a.bias"), STATE["a.bias"])
    monkeypatch.undo()
    with pytest.raises(IngredientError, match=r"a\.pt changed while it was in use: it was replaced"):
        check_unchanged([ingredient])


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    save = save_file if name.endswith("safetensors") else torch.save
    save(STATE, tmp_path / name)

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mapped.os, "open", refuse)
    with pytest.raises(IngredientError, match=f"/{name} cannot be read .Permission denied"):
        open_ingredient(str(tmp_path / name))


def test_files_are_opened_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = [open_ingredient(str(saved(tmp_path / f"{name}.pt"))) for name in "ab"]
    both = Barrier(2)
    open_tensors = ingredient_module.open_tensors

    def together(*arguments: Any) -> Any:
        both.wait(timeout=60)
        return open_tensors(*arguments)

    monkeypatch.setattr(ingredient_module, "open_tensors", together)
    with ThreadPoolExecutor(4) as pool:  # two threads for each file: the second one waits for the first
        read = list(pool.map(lambda i: i.read("a.bias"), opened * 2))
    assert all(torch.equal(values, STATE["a.bias"]) for values in read)


@pytest.mark.parametrize("how", ["replaced", "rewritten", "longer"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_no_soup_is_made_of_a_file_that_changes_while_it_is_mixed(tmp_path: Path, suffix: str, how: str) -> None:
    from ray_soup.mixing.bake import bake
    from ray_soup.mixing.coefficients import Coefficients

    names = [f"w{n}" for n in range(6)]

    def write(path: Path, value: float) -> None:
        tensors = {name: torch.full((100,), value) for name in names}
        save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)

    for step in range(len(names) + 1):  # after how many tensors the file changes
        for k in range(2):
            write(tmp_path / f"{k}.{suffix}", float(k))
        write(tmp_path / "other", 9.0)
        path, seen = tmp_path / f"1.{suffix}", 0

        def change(*_news: int, path: Path = path, step: int = step) -> None:
            nonlocal seen
            time.sleep(0.02)  # as above
            if seen == step and how == "replaced":
                (tmp_path / "other").replace(path)
            elif seen == step:
                data = (tmp_path / "other").read_bytes()
                with open(path, "r+b") as file:
                    file.write(data + b"longer" * (how == "longer"))
            seen += 1

        ingredients = [open_ingredient(str(tmp_path / f"{k}.{suffix}")) for k in range(2)]
        c = Coefficients(np.full((2, 1), 0.5), ("0", "1"), ("m",), dict.fromkeys(names, 0))
        if step == len(names):  # after the last read: too late for the soup to notice, and harmless
            soup = load_file(bake(c, ingredients, tmp_path / "soup", 1))
            assert all(torch.equal(tensor, torch.full((100,), 0.5)) for tensor in soup.values())
            continue
        with pytest.raises(IngredientError, match=rf"1\.{suffix} changed while it was in use"):
            bake(c, ingredients, tmp_path / "soup", 1, change)
        assert not (tmp_path / "soup").exists()


def test_a_file_that_is_cut_under_its_memory_map_ends_the_process_with_a_sentence(tmp_path: Path) -> None:
    script = """
        import faulthandler, os, sys
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np, torch
        from safetensors.torch import save_file
        from ray_soup.io.ingredient import open_ingredient
        from ray_soup.mixing.kernels import mix
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        faulthandler.enable()  # as Ray does
        mix([np.ones(2, np.float32)], np.ones(1), np.zeros(2, np.float32))
        work = {
            "torch": lambda part: part.sum().item(),
            "torch on two threads": lambda part: part.double(),
            "a pool": lambda part: ThreadPoolExecutor(1).submit(part.sum).result(),
            "numpy": lambda part: part.numpy().sum(),
            "numba": lambda part: mix([part.numpy()], np.ones(1), np.zeros(len(part), np.float32)),
        }
        for what, run in work.items():
            for name in ("a.pt", "a.safetensors"):
                path = os.path.join(sys.argv[1], name)
                tensors = {"w": torch.zeros(400_000)}
                save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
                child = os.fork()
                if child == 0:
                    torch.set_num_threads(2)
                    part = open_ingredient(path).read("w")
                    os.truncate(path, 4096)
                    run(part)
                    os._exit(0)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), what, name)
    """
    done = child(script, str(tmp_path))
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1"] * 10, (done.stdout, done.stderr)
    for name in ("a.pt", "a.safetensors"):
        assert done.stderr.count(f"Error: {tmp_path / name} was cut while it was in use") == 5
    assert "Traceback" not in done.stderr
    assert "Fatal" not in done.stderr


# What else people store


def test_a_key_with_many_values_leaves_the_others_alone(tmp_path: Path) -> None:
    history = {"history": [0.1] * 9_990, "more": [0.1] * 9_990, "too many": {"a": 1, "b": [0.1] * 10_000}}
    groups = [{"params": [i], "lr": 0.1} for i in range(5000)]
    content = {**history, "optimizer": {"param_groups": groups}, "state_dict": STATE, "args": {"img_size": 64}}
    metadata = open_ingredient(str(saved(tmp_path / "a.pt", content))).metadata
    assert set(metadata) == {"history", "more", "args"}
    assert metadata["args"] == {"img_size": 64}


def test_plain_values_beside_the_tensors_are_metadata(tmp_path: Path) -> None:
    from argparse import Namespace

    content = {
        "state_dict": STATE,
        "epoch": 7,
        "arch": "resnet18",
        "args": Namespace(img_size=288, mean=(0.5, 0.5, 0.5), crop=None, nested={"lr": 0.1, "on": True}),
        "metrics": [{"acc": np.float64(0.5), "n": np.int64(3), "f": np.float32(0.25)}],
        "optimizer": {"state": {0: torch.zeros(2)}, "param_groups": [{"lr": 0.1}]},
        "best": float("nan"),
        "long": "x" * 20_000,
    }
    ingredient = open_ingredient(str(saved(tmp_path / "a.pt", content)))
    assert set(ingredient.tensors) == set(STATE)
    metadata = dict(ingredient.metadata)
    assert metadata["args"] == {"img_size": 288, "mean": [0.5, 0.5, 0.5], "nested": {"lr": 0.1, "on": True}}
    assert (metadata["epoch"], metadata["arch"]) == (7, "resnet18")
    assert metadata["metrics"] == [{"acc": 0.5, "n": 3, "f": 0.25}]
    assert not {"best", "long", "state_dict"} & set(metadata)
    save_file(STATE, tmp_path / "a.safetensors", {"format": "pt"})
    assert open_ingredient(str(tmp_path / "a.safetensors")).metadata == {"format": "pt"}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(8, 5)
        with torch.no_grad():
            self.a.weight.copy_(STATE["a.weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.trace(Net(), torch.zeros(1, 8)), path)


CONTENTS: dict[str, Callable[[Path], None]] = {
    "TorchScript": scripted,
    "a module": lambda p: torch.save(Net(), p),
    "a module under a key": lambda p: torch.save({"epoch": 1, "model": Net()}, p),
    "a path beside the tensors": lambda p: torch.save({"state_dict": Net().state_dict(), "where": Path("x")}, p),
    "a path among the tensors": lambda p: torch.save({**Net().state_dict(), "where": Path("x")}, p),
    "protocol 4": lambda p: torch.save(Net().state_dict(), p, pickle_protocol=4),
    "the legacy format": lambda p: torch.save(Net().state_dict(), p, _use_new_zipfile_serialization=False),
}
NAMES = ["a.pt", 'it\'s $(touch hacked) "q" `x`.pt', "new\nline \\ é.ckpt"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*jit.*")
@pytest.mark.parametrize("content", CONTENTS)
def test_the_command_in_the_message_extracts_the_state_dict(tmp_path: Path, content: str) -> None:
    path = tmp_path / NAMES[sorted(CONTENTS).index(content) % len(NAMES)]
    CONTENTS[content](path)
    with pytest.raises(IngredientError) as error:
        open_ingredient(str(path))
    command = str(error.value)[str(error.value).index("python -c") :]
    shell = ["bash", "-c", f'python() {{ printf %s "$2"; }}; {command}']
    code = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path, check=True).stdout  # as Python would get it
    exec(code, {})
    found = [p for p in tmp_path.iterdir() if p.name.endswith(".state_dict.pt")]
    assert [p.name for p in tmp_path.iterdir() if p not in (path, *found)] == []
    assert torch.equal(open_ingredient(str(found[0])).read("a.weight"), STATE["a.weight"].flatten())


@pytest.mark.parametrize("content", ["plain pickle", "text", "npz", "zeros"])
def test_other_files_are_named_as_what_they_are(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.pt"
    array = io.BytesIO()
    np.savez(array, a=np.zeros(3))
    path.write_bytes(
        {
            "plain pickle": pickle.dumps({"a": 1}),
            "text": b"hello",
            "npz": array.getvalue(),
            "zeros": bytes(1000),
        }[content]
    )
    with pytest.raises(IngredientError, match=r"a\.pt (is a pickle that torch|cannot be read as a torch checkpoint)"):
        open_ingredient(str(path))


# Many files


def test_open_ingredients_hold_no_file_descriptors(tmp_path: Path) -> None:
    from ray_soup.io.storage import LocalFile

    held = []
    for k in range(5):
        saved(tmp_path / f"{k}.pt")
        save_file(STATE, tmp_path / f"{k}.safetensors")
        for suffix in ("pt", "safetensors"):
            ingredient = open_ingredient(str(tmp_path / f"{k}.{suffix}"))
            held.append((ingredient, ingredient.read("a.weight"), LocalFile(ingredient.path)))
    assert len(held) == 10
    opened = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing
            opened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    assert opened
    assert not [name for name in opened if name.startswith(str(tmp_path))]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_index_decides_which_shard_a_tensor_comes_from(tmp_path: Path, kind: str) -> None:
    import json

    def write(second: dict[str, torch.Tensor]) -> None:
        for name, tensors in (("1", {"a": torch.ones(2)}), ("2", second)):
            file = tmp_path / f"{name}.{kind}"
            save_file(tensors, file) if kind == "safetensors" else torch.save({"state_dict": tensors}, file)

    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"1.{kind}", "b": f"2.{kind}"}}))
    write({"a": torch.zeros(2), "b": torch.full((2,), 5.0)})
    ingredient = open_ingredient(str(index))
    assert (ingredient.read("a").tolist(), ingredient.read("b").tolist()) == ([1.0, 1.0], [5.0, 5.0])
    for second, message in (
        ({"a": torch.zeros(2)}, "lacks the tensor b"),
        ({"b": torch.ones(1), "c": torch.ones(1)}, "has the tensor c"),
    ):
        write(second)
        with pytest.raises(IngredientError, match=rf"2\.{kind} {message}"):
            open_ingredient(str(index))


@pytest.mark.parametrize(
    "row", [np.zeros(4, np.float32), np.zeros(5), np.zeros(10, np.float32)[::2], np.zeros(21, np.uint8)[1:].view(np.float32)]
)
def test_compiled_loops_take_addresses_of_sound_arrays_only(row: np.ndarray[Any, Any]) -> None:
    from ray_soup.mixing.kernels import addresses

    sound = np.zeros(5, np.float32)
    assert list(addresses([sound, sound], 5)) == [sound.ctypes.data] * 2
    with pytest.raises(ValueError, match=r"row 1 is .*contiguous and aligned"):
        addresses([sound, row], 5)
