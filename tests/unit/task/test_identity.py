"""The identity of code in cache keys: equal in every process, another one after any edit of what runs."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.io.progress import drain
from ray_soup.recipe import Data
from ray_soup.task import code_files
from ray_soup.task.code_files import version
from ray_soup.task.data import load_named
from ray_soup.task.identity import identify, in_run, notes_on, without_addresses
from ray_soup.task.models import build, fingerprint
from ray_soup.task.preprocess import preprocess_identity
from tests.conftest import ROOT
from tests.unit.task.images import pictures, write_parquet

HELPER = """
import numpy as np
SCALE = 2
def scaled(image): return np.asarray(image, dtype=np.float32) * SCALE
"""
READER = "import numpy\ndef table(): return numpy.genfromtxt('table.txt')\n"
LATE = "def shifted(array): return array + 1\n"
MINE = """
import functools
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T
import helper
from folder import inner

TABLE = np.arange(4.0)

def darker(by):
    def darken(image): return np.asarray(image, dtype=np.float32) * by
    return darken

class Own:
    def __init__(self, by): self.by = by
    def __call__(self, image): return helper.scaled(image) * self.by * TABLE[1]

class Looks:
    "An object with `transforms` that is no Compose."
    def __init__(self, by): self.transforms, self.by = [], by
    def __call__(self, image): return np.asarray(image) * self.by

def function(image): return helper.scaled(image)
def late(image):
    import late_helper
    return late_helper.shifted(np.asarray(image))
def default(image, by=2): return np.asarray(image) * by
def reads(image): return np.load("table.npy") * np.asarray(image)
def opens(image): return open("table.txt").read()
def loads(image): return torch.load("table.pt") * np.asarray(image)
def reads_path(image):
    with Path("table.txt").open() as file: return float(file.readline())
def reads_text(image): return float(Path("table.txt").read_text())
def imports(image):
    from reader import table
    return table()
class Lazy:
    table = None
    def __call__(self, image):
        if self.table is None: self.table = np.loadtxt("table.txt")
        return self.table
lazy = Lazy()
def decodes(image): return np.asarray(Image.open(image))
def from_environment(image):
    import os
    return np.asarray(image) * float(os.environ["BY"])

OBJECTS = {
    "lambda": T.Compose([T.Resize(4), T.Lambda(lambda image: image.rotate(3)), T.ToTensor()]),
    "partial": functools.partial(default, by=3),
    "closure": darker(0.5),
    "object": Own(0.5),
    "bound": Own(0.5).__call__,
    "looks": Looks(1),
    "function": function,
    "late": late,
    "default": default,
    "module": nn.Sequential(nn.Flatten()),
}

class Net(nn.Module):
    def __init__(self, temperature=1.0):
        super().__init__()
        self.head, self.temperature = nn.Linear(4, 3), temperature
        self.register_buffer("shift", torch.full((3,), 0.5), persistent=False)
    def forward(self, x): return self.head(helper.scaled(x)) * self.temperature + self.shift

def build(): return Net()
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Write the user's modules, with some text replaced, and import them as a new process would."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(file: str = "", old: str = "", new: str = "") -> ModuleType:
        files = {"mine.py": MINE, "helper.py": HELPER, "late_helper.py": LATE}
        files |= {"reader.py": READER, "folder/__init__.py": "", "folder/inner.py": "A = 1\n"}
        if file:
            assert old in files[file]
            files[file] = files[file].replace(old, new)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        for name in ("mine", "helper", "late_helper", "folder", "folder.inner"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        monkeypatch.chdir(tmp_path)
        if str(tmp_path) not in sys.path:
            sys.path.append(str(tmp_path))
        return importlib.import_module("mine")

    return write


def identities(module: ModuleType) -> dict[str, list[str]]:
    return {name: preprocess_identity(value) for name, value in module.OBJECTS.items()}


@pytest.mark.parametrize(
    ("file", "old", "new", "names"),
    [
        ("mine.py", "rotate(3)", "rotate(4)", ["lambda"]),
        ("mine.py", "default, by=3", "default, by=4", ["partial"]),
        ("mine.py", "darker(0.5)", "darker(0.6)", ["closure"]),
        ("mine.py", "Own(0.5)", "Own(0.6)", ["object", "bound"]),
        ("mine.py", "arange(4.0)", "arange(5.0)", ["object", "bound"]),
        ("mine.py", "Looks(1)", "Looks(2)", ["looks"]),
        ("helper.py", "SCALE = 2", "SCALE = 3", ["lambda", "object", "bound", "function", "late", "default", "closure"]),
        ("late_helper.py", "+ 1", "+ 2", ["late"]),
        ("folder/inner.py", "A = 1", "A = 2", ["function"]),
        ("mine.py", "by=2", "by=4", ["default"]),
    ],
)
def test_an_edit_of_what_runs_changes_the_identity(
    mine: Callable[..., ModuleType], file: str, old: str, new: str, names: list[str]
) -> None:
    before = identities(mine())
    assert identities(mine()) == before
    after = identities(mine(file, old, new))
    assert [name for name in names if after[name] == before[name]] == []
    assert after["module"] == before["module"]  # only installed code


def test_code_that_is_still_loaded_is_told_from_the_file_that_was_edited_meanwhile(
    mine: Callable[..., ModuleType], tmp_path: Path
) -> None:
    """As in a notebook: the module was imported, its helper edited, and a later process runs the new helper."""
    loaded = mine()
    before = identities(loaded)["object"]
    (tmp_path / "helper.py").write_text(HELPER.replace("SCALE = 2", "SCALE = 3"))
    stale = identities(loaded)["object"]
    new = identities(mine("helper.py", "SCALE = 2", "SCALE = 3"))["object"]
    assert len({str(before), str(stale), str(new)}) == 3


@pytest.mark.slow
def test_every_process_finds_the_same_identity(mine: Callable[..., ModuleType], tmp_path: Path) -> None:
    expected = identities(mine())
    script = (
        "import sys; sys.path.append('.'); import mine; from ray_soup.task.preprocess import preprocess_identity as p; "
        "print({name: p(value) for name, value in mine.OBJECTS.items()})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == str(expected)
    assert "0x" not in done.stdout


OUTSIDE = ("opens", "from_environment", "reads", "loads", "reads_path", "reads_text", "imports", "lazy")


@pytest.mark.parametrize("name", OUTSIDE)
def test_code_that_reads_more_than_its_arguments_is_equal_to_none_of_another_process(
    mine: Callable[..., ModuleType], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, outside = getattr(mine(), name), list[str]()
    before = preprocess_identity(function, outside)
    assert preprocess_identity(function) == before
    called = "Lazy.__call__" if name == "lazy" else name
    assert notes_on(outside) == [
        f"The code of mine.{called} reads files or cannot be identified: its results are not reused by other runs."
    ]
    monkeypatch.setattr("ray_soup.task.identity.RUN", "another run")
    assert preprocess_identity(function) != before
    in_run("one run")
    shared = preprocess_identity(function)
    in_run("another")
    assert preprocess_identity(function) != shared
    in_run("one run")
    assert preprocess_identity(function) == shared


@pytest.mark.parametrize("name", ["function", "late", "default", "decodes"])
def test_other_code_is_reused_by_every_run(mine: Callable[..., ModuleType], name: str) -> None:
    outside: list[str] = []
    preprocess_identity(getattr(mine(), name), outside)
    assert notes_on(outside) == []


def test_what_cannot_be_identified_is_equal_to_none_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as file:
        before = identify(functools.partial(print, file=file))
        monkeypatch.setattr("ray_soup.task.identity.RUN", "another process")
        assert identify(functools.partial(print, file=file)) != before


def cyclic() -> list[Any]:
    values: list[Any] = [1]
    values.append(values)
    return values


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (lambda: 1, lambda: 1, lambda: 2),
        (lambda: 1, lambda: 1, lambda: True),
        (lambda: {1, 2, 3}, lambda: {3, 2, 1}, lambda: {1, 2}),
        (lambda: [1, [2]], lambda: [1, [2]], lambda: [1, 2]),
        (lambda: {"a": np.ones(2)}, lambda: {"a": np.ones(2)}, lambda: {"a": np.ones(2, np.float32)}),
        (lambda: torch.ones(2, 3), lambda: torch.ones(3, 2).T.contiguous(), lambda: torch.ones(3, 2)),
        (lambda: torch.arange(4)[::2], lambda: torch.tensor([0, 2]), lambda: torch.tensor([0, 1])),
        (lambda: np.random.default_rng(0), lambda: np.random.default_rng(0), lambda: np.random.default_rng(1)),
        (cyclic, cyclic, lambda: [1, [1]]),
    ],
)
def test_values_are_identified_by_content(one: Callable[[], Any], same: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert identify(one()) != identify(other())
    assert identify(one()) == identify(same())


def test_addresses_are_removed_from_texts() -> None:
    assert without_addresses(f"f={print!r} {test_addresses_are_removed_from_texts!r} {object()!r}").count("0x") == 0


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mine.py", "temperature=1.0", "temperature=2.0"),
        ("mine.py", "0.5), persistent", "0.25), persistent"),
        ("mine.py", "+ self.shift", "- self.shift"),
        ("helper.py", "SCALE = 2", "SCALE = 3"),
        ("mine.py", "return Net()", "return Net(3.0)"),
    ],
)
def test_a_fingerprint_covers_all_that_the_outputs_depend_on_but_the_parameters(
    mine: Callable[..., ModuleType], file: str, old: str, new: str
) -> None:
    mine()
    built = build("mine:build")
    before = fingerprint("mine:build", built)
    assert fingerprint("mine:build", build("mine:build")) == before  # other random parameters
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.zero_()
    assert fingerprint("mine:build", built) == before
    mine(file, old, new)
    assert fingerprint("mine:build", build("mine:build")) != before


FROM_FILE = """
import json
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self._scale = nn.Linear(4, 3), json.load(open("scale.json"))
    def forward(self, x): return self.head(x) * self._scale

def hooked(scale):
    return lambda module, inputs, output: output * scale

def private(): return Net()
def by_hook():
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_forward_hook(lambda *_: None).remove()  # the next key is another one in every call
    model[0].register_forward_hook(hooked(json.load(open("scale.json"))))
    return model
def replaced():
    model, scale = nn.Sequential(nn.Linear(4, 3)), json.load(open("scale.json"))
    model.forward = lambda x: nn.Sequential.forward(model, x) * scale
    return model
def attribute():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    model[0].scale = json.load(open("scale.json"))
    return model
"""


@pytest.mark.parametrize("name", ["private", "by_hook", "replaced", "attribute"])
def test_a_constant_that_a_model_read_while_it_was_built_is_in_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "from_file", raising=False)
    (tmp_path / "from_file.py").write_text(FROM_FILE)
    found = []
    for scale in (2, 2, 3):
        (tmp_path / "scale.json").write_text(str(scale))
        found.append(fingerprint(f"from_file:{name}", build(f"from_file:{name}")))
    assert found[0] == found[1] != found[2]
    monkeypatch.delitem(sys.modules, "from_file")


def test_each_source_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when many functions of modules that import each other are identified."""
    count = 8
    (tmp_path / "lab").mkdir()
    for n in range(count):
        before = "".join(f"from lab.m{m} import f{m}\n" for m in range(n))
        calls = "".join(f"def f{n}{'x' * k}(x): return x{f' + f{n - 1}(x)' if n else ''}\n" for k in range(4))
        (tmp_path / "lab" / f"m{n}.py").write_text(before + calls)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    parsed: list[bytes] = []
    parse = ast.parse
    monkeypatch.setattr("ray_soup.task.code_files.ast.parse", lambda text: parsed.append(text) or parse(text))
    last = importlib.import_module(f"lab.m{count - 1}")
    before = preprocess_identity(getattr(last, f"f{count - 1}"))
    assert len(parsed) == count
    (tmp_path / "lab" / "m0.py").write_text("def f0(x): return x\n")
    assert preprocess_identity(getattr(last, f"f{count - 1}")) != before
    assert len(parsed) == count + 1
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("recorded", [True, False])
def test_an_installed_package_that_was_changed_under_the_same_version_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    site = tmp_path / "site-packages"
    package, info = site / "installed_here", site / "installed_here-1.0.dist-info"
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    found = []
    for by in (2, 2, 3):
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("from installed_here.inner import f\n")
        (package / "inner.py").write_text(f"def f(image): return image * {by}\n")
        if recorded:
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed_here\nVersion: 1.0\n")
            (info / "RECORD").write_text(f"installed_here/inner.py,sha256={by},9\ninstalled_here-1.0.dist-info/RECORD,,\n")
        for name in ("installed_here", "installed_here.inner"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        for cache in (
            version,
            code_files._contents,
            code_files._distributions,
            code_files._by_module,
        ):  # as in a new process
            cache.cache_clear()
        found.append(preprocess_identity(importlib.import_module("installed_here").f))
    assert found[0] == found[1] != found[2]
    for name in ("installed_here", "installed_here.inner"):
        monkeypatch.delitem(sys.modules, name)
    version.cache_clear()


def test_an_editable_library_counts_as_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not walked, which takes minutes for a large one; an edit of any of its files changes the identity."""
    monkeypatch.setattr(code_files, "LIBRARIES", ("edited_here",))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(tmp_path / "site")])
    info = tmp_path / "site" / "edited_here-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edited_here\nVersion: 1.0\n")
    (info / "RECORD").write_text("__editable__.edited_here-1.0.pth,sha256=x,9\n")
    (tmp_path / "edited_here").mkdir()
    (tmp_path / "edited_here" / "__init__.py").write_text("import torch\ndef f(image): return torch.load(image)\n")
    found = []
    for text in ("A = 1\n", "A = 1\n", "A = 2\n"):
        (tmp_path / "edited_here" / "inner.py").write_text(text)
        for cache in (version, code_files._contents, code_files._distributions, code_files._by_module):
            cache.cache_clear()
        outside: list[str] = []
        found.append(preprocess_identity(importlib.import_module("edited_here").f, outside))
        assert outside == []
    assert found[0] == found[1] != found[2]
    monkeypatch.delitem(sys.modules, "edited_here")
    version.cache_clear()


def test_decoded_data_are_not_taken_from_the_cache_after_an_edit(mine: Callable[..., ModuleType], tmp_path: Path) -> None:
    images = [image.resize((8, 8)) for image in pictures()]
    write_parquet(tmp_path / "a.parquet", images, range(6))

    data = Data(test=str(tmp_path / "a.parquet"))

    def decoded(module: ModuleType) -> np.ndarray:
        return np.array(drain(load_named(data, "test", module.OBJECTS["function"])).images)

    first = decoded(mine())
    assert np.array_equal(first, np.stack([np.asarray(image, np.float32) * 2 for image in images]))
    assert np.array_equal(decoded(mine("helper.py", "SCALE = 2", "SCALE = 3")), first * 1.5)
