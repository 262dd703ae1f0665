"""Functions of the user's that fail in every way: each becomes one sentence with the function's own lines."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.task import models
from ray_soup.task.functions import call, failure, import_function, installed_first, look_in
from ray_soup.task.models import build, describe, outputs_of
from ray_soup.task.objective import Classification
from ray_soup.task.own_functions import loss_of, metric_of
from tests.conftest import ROOT

LABEL = torch.zeros(1, dtype=torch.int64)
HOSTILE = '''
import sys
import torch
from torch import nn

count = 3

class Net(nn.Linear):
    def __init__(self): super().__init__(4, 3)

def raises(): return nn.Linear(4, 3)(torch.zeros(1, 7))
def exits(): sys.exit(0)
def exits_with_text(): sys.exit("no model today")
def quits(): raise SystemExit
def recurses(): return recurses()
def out_of_memory(): raise MemoryError
def stops(): raise StopIteration
def odd():
    class Odd(Exception):
        def __str__(self): raise ValueError("no text")
    raise Odd
def takes(width): return nn.Linear(width, 3)
def a_class(): return Net
def nothing(): pass
def generator(): yield Net()
async def coroutine(): return Net()
def three(): return Net(), None, None
def pair_of_classes(): return Net(), Net
def text(): return "a model"
def lazy(): return nn.LazyLinear(3)
def complex_numbers(): return nn.Linear(4, 3, dtype=torch.complex64)
class Extra(Net):
    def get_extra_state(self): return torch.ones(2)
    def set_extra_state(self, state): pass
class Hooked(Net):
    def state_dict(self, *args, **kwargs):
        return {f"x.{k}": v for k, v in super().state_dict(*args, **kwargs).items()}
def prints():
    print("building")
    return Net()

class Given(Net):
    def __init__(self, made):
        super().__init__()
        self.made = made
    def forward(self, x): return self.made(super().forward(x))
def in_tuple(): return Given(lambda y: (y,))
def in_dict(): return Given(lambda y: {"logits": y})
def nameless(): return Given(lambda y: {"scores": y})
def integers(): return Given(lambda y: y.argmax(1, keepdim=True))
def flat(): return Given(lambda y: y[0])
def exits_in_forward(): return Given(lambda y: sys.exit(0))
def none_in_forward(): return Given(lambda y: None)

def loss_exits(logits, labels): sys.exit(0)
def loss_of_one(logits): return logits.sum(1)
def loss_on_numpy(logits, labels): return logits.detach().numpy().sum(1)
def loss_of_integers(logits, labels): return labels
def loss_nan(logits, labels): return logits.sum(1) * float("nan")
def loss_shape(logits, labels): return logits
def loss_in_place(logits, labels):
    labels.add_(1)
    return logits.sum(1)
def loss_of_others(logits, labels): return torch.ones(len(labels), requires_grad=True)
def loss_steep(logits, labels): return (logits * 0).sum(1).abs().sqrt()
def metric_float(logits, labels): return 0.5
def metric_in_place(logits, labels):
    logits.zero_()
    return logits[:, 0]
def metric_nan(logits, labels): return logits[:, 0] / 0 * 0
def metric_recurses(logits, labels): return metric_recurses(logits, labels)
'''  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_functions.py").write_text(HOSTILE)
    (folder / "broken_syntax.py").write_text("def build(:\n    pass\n")
    (folder / "broken_import.py").write_text("import no_such_package_of_mine\n")
    (folder / "exits_at_import.py").write_text("import sys\n\nsys.exit(0)\n")
    (folder / "raises_at_import.py").write_text("SIZES = [1]\nSIZE = SIZES[3]\n")
    (folder / "lazy_attribute.py").write_text("def __getattr__(name):\n    raise KeyError(name)\n")
    (folder / "statistics.py").write_text("def build(): pass\n")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(sys, "path", sys.path.copy())


def refused(action: object, *arguments: object) -> str:
    with pytest.raises(RecipeError) as caught:
        action(*arguments)  # type: ignore[operator]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as it comes out of an actor
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("broken_syntax:build", "broken_syntax:build raised SyntaxError|broken_syntax.py, line 1: def build(:"),
        ("broken_import:build", "No module named 'no_such_package_of_mine'|broken_import.py, line 1, in <module>: import"),
        ("exits_at_import:build", "tried to exit the program: sys.exit(0)|exits_at_import.py, line 3, in <module>: sys"),
        ("raises_at_import:build", "raised IndexError: list index out of range|line 2, in <module>: SIZE = SIZES[3]"),
        ("lazy_attribute:build", "raised KeyError|lazy_attribute.py, line 2"),
        ("not_there:build", "the module not_there cannot be imported|Put it in the current folder"),
        ("statistics:build", "has no 'build'|The installed statistics (|hides |statistics.py: rename yours"),
        ("statistics.mine:build", "cannot be imported|hides |rename yours"),
        ("hostile_functions:gone", "the module hostile_functions has no 'gone'|hostile_functions.py"),
        ("hostile_functions:count", "is of type int; expected model()"),
        ("hostile_functions:takes", "has the signature (width), and is called with no arguments"),
        ("hostile_functions:raises", "raised RuntimeError: mat1 and mat2 shapes|line 11, in raises: def raises()"),
        ("hostile_functions:exits", "tried to exit the program: sys.exit(0)|in exits: def exits(): sys.exit(0)"),
        ("hostile_functions:exits_with_text", "tried to exit the program: sys.exit(no model today)"),
        ("hostile_functions:quits", "tried to exit the program"),
        ("hostile_functions:recurses", "raised RecursionError|in recurses: def recurses(): return recurses()"),
        ("hostile_functions:out_of_memory", "raised MemoryError|in out_of_memory"),
        ("hostile_functions:stops", "raised StopIteration"),
        ("hostile_functions:odd", "raised Odd"),
        ("hostile_functions:a_class", "returned the class Net instead of an object of it; expected a model"),
        ("hostile_functions:nothing", "returned NoneType; expected a model"),
        ("hostile_functions:generator", "returned generator"),
        ("hostile_functions:coroutine", "returned coroutine"),
        ("hostile_functions:three", "returned tuple (Net, NoneType, NoneType)"),
        ("hostile_functions:pair_of_classes", "returned tuple (Net, the class Net); expected a model, or (model,"),
        ("hostile_functions:text", "returned str"),
        ("hostile_functions:lazy", "the shape of weight is not known yet"),
        ("hostile_functions:Extra", "_extra_state in its state dict is neither a parameter nor a buffer"),
        ("hostile_functions:Hooked", "is neither a parameter nor a buffer"),
        ("hostile_functions:complex_numbers", "weight is torch.complex64; expected floats"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning", "ignore:Lazy modules:UserWarning")
def test_a_model_function_that_fails_is_described(spec: str, said: str) -> None:
    message = refused(describe, spec)
    for part in said.split("|"):
        assert part in message
    assert spec in message or "expected floats" in message
    assert "ray_soup/task" not in message  # none of our own lines
    assert len(message.splitlines()) <= 6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nameless", r"returned dict for one example of data\.npz.*expected a tensor, alone, first in a tuple, or as `log"),
        ("integers", r"returned torch.int64 \[1, 1\]"),
        ("flat", r"returned torch.float32 \[3\]"),
        ("none_in_forward", "returned NoneType"),
        ("exits_in_forward", "cannot process one example of data.npz, .*SystemExit.*\n.*in exits_in_forward|in <lambda>"),
    ],
)
def test_a_model_that_does_not_return_logits_is_described(name: str, said: str) -> None:
    spec = f"hostile_functions:{name}"
    model = build(spec).model
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        outputs_of(model, torch.zeros(1, 4), LABEL, Classification(), spec, "data.npz")


@pytest.mark.parametrize("name", ["Net", "in_tuple", "in_dict"])
def test_a_model_that_returns_logits_alone_or_with_others_passes(name: str) -> None:
    spec = f"hostile_functions:{name}"
    assert outputs_of(build(spec).model, torch.zeros(1, 4), LABEL, Classification(), spec, "a").shape == (1, 3)


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        ("loss", "loss_exits", "tried to exit the program: sys.exit(0)"),
        ("loss", "loss_of_one", "has the signature (logits), and is called with 2 arguments"),
        ("loss", "loss_on_numpy", "returned ndarray; expected float losses [3]"),
        ("loss", "loss_of_integers", "returned [3] of torch.int64"),
        ("loss", "loss_nan", "returned nan for synthetic logits"),
        ("loss", "loss_shape", "returned [3, 5]"),
        ("loss", "loss_in_place", "changes its argument 'labels' in place"),
        ("loss", "loss_of_others", "has no gradient with respect to the logits"),
        ("loss", "loss_steep", "has a gradient that is not finite"),
        ("metric", "metric_float", "returned float; expected a score for each of 3 examples"),
        ("metric", "metric_in_place", "changes its argument 'logits' in place"),
        ("metric", "metric_nan", "returned nan for synthetic logits"),
        ("metric", "metric_recurses", "raised RecursionError"),
        ("metric", "count", "is of type int; expected metric(outputs, targets)"),
    ],
)
def test_a_loss_or_metric_that_fails_is_described(key: str, name: str, said: str) -> None:
    recipe = make_recipe({"model": "tests.tiny:build", key: f"hostile_functions:{name}"})
    message = refused(loss_of if key == "loss" else metric_of, recipe, Classification(), torch.zeros(1, 5), LABEL)
    assert message.startswith(f"{key}: hostile_functions:{name} ")
    assert said in message


def test_what_a_function_prints_does_not_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    build("hostile_functions:prints")
    assert capsys.readouterr() == ("", "building\n")


def test_an_interrupt_is_not_an_error_of_the_function() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("model", "a:b", interrupted)


@pytest.mark.parametrize("replaced", [False, True], ids=["sys.exit", "sys.exit of W&B"])
def test_an_exit_by_a_signal_handler_is_not_an_error_of_the_function(
    replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray turns SIGTERM into sys.exit(15) within whatever runs."""
    monkeypatch.setattr(sys, "exit", sys.exit)  # put back afterwards what the hook replaces
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    if replaced:
        pytest.importorskip("wandb.sdk.lib.exit_hooks").ExitHooks().hook()
    space = {"__name__": "ray._private.worker"}
    exec("import sys\ndef handler(): sys.exit(15)", space)
    with pytest.raises(SystemExit):
        call("model", "a:b", lambda: space["handler"]())  # type: ignore[operator]


def test_the_last_lines_are_the_functions_own() -> None:
    with pytest.raises(RecipeError) as caught:
        call("data.test.a", "hostile_functions:raises", import_function("hostile_functions:raises"))
    cause = caught.value.__cause__
    assert cause is not None
    text = failure("data.test.a", "hostile_functions:raises", cause)
    assert text == str(caught.value)
    assert text.splitlines()[1].startswith("    hostile_functions.py, line 11, in raises: def raises()")
    assert text.endswith("Expected dataset() without required arguments that returns a sequence of pairs (input, label). "
                         "Fix the function.")  # fmt: skip


def test_a_failing_function_is_not_called_more_than_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted() -> None:
        calls.append(1)
        raise ValueError("no")

    monkeypatch.setattr(models, "import_function", lambda spec, key="": counted)
    with pytest.raises(RecipeError, match="raised ValueError: no"):
        describe("tests.tiny:build")
    assert len(calls) == 2  # on the meta device, and for real


# The module search path


def test_the_current_folder_is_behind_the_installed_packages(tmp_path: Path) -> None:
    """A matplotlib.py or jinja2.py in the current folder does not replace the library for the command."""
    (tmp_path / "jinja2.py").write_text("raise RuntimeError('the wrong jinja2')\n")
    (tmp_path / "mine.py").write_text("def build():\n    pass\n")
    script = (
        "import json, sys; sys.argv[0] = 'ray-soup'; "
        "from ray_soup.task.functions import import_function; import_function('mine:build'); "
        "import jinja2, mine; print(json.dumps([jinja2.__file__, mine.__file__]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    library, own = json.loads(done.stdout)
    assert "site-packages" in library
    assert Path(own) == tmp_path / "mine.py"


def test_the_path_of_a_notebook_or_script_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During the import of a function installed modules come first; then the user's own order is back."""
    (tmp_path / "jinja2.py").write_text("")
    (tmp_path / "more").mkdir()
    (tmp_path / "adds_to_the_path.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path / 'more')!r})\nsys.path.append('/end')\n"
        "seen = sys.path.copy()\ndef build(): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    for own in (["", "/mine"], [str(tmp_path)], []):
        before = [*own, *(entry for entry in sys.path if entry not in ("", str(tmp_path)))]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", before.copy())
            patch.delitem(sys.modules, "adds_to_the_path", raising=False)
            function = import_function("adds_to_the_path:build")
            folder = [] if own else [str(tmp_path)]
            assert sys.path == [str(tmp_path / "more"), *before, *folder, "/end"]
            seen = function.__globals__["seen"]
            assert all(seen.index(entry) > seen.index(os.path.dirname(torch.__path__[0])) for entry in own)
    monkeypatch.setattr(sys, "path", ["", "/usr/lib"])
    look_in(str(tmp_path))
    assert sys.path == ["", "/usr/lib"]
    monkeypatch.setattr(sys, "argv", ["/venv/bin/ray-soup", "learn"])
    look_in(str(tmp_path))
    assert sys.path == ["/usr/lib", str(tmp_path)]


def test_a_module_that_is_another_one_in_workers_is_refused(tmp_path: Path) -> None:
    """A script's own folder comes first for the script; for workers it comes behind the installed packages."""
    (tmp_path / "jinja2.py").write_text("def build(): pass\n")
    (tmp_path / "mine.py").write_text("def build(): pass\n")
    (tmp_path / "driver.py").write_text(
        "import jinja2, mine\nfrom ray_soup.task.functions import import_function\n"
        "import_function('mine:build')\n"
        "try: import_function('jinja2:build')\nexcept Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"jinja2:build: jinja2 is {tmp_path / 'jinja2.py'} in this process, and ")
    assert "site-packages" in done.stdout


def test_in_a_worker_process_the_drivers_folders_go_behind_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [entry for entry in sys.path if "site-packages" in entry or entry == os.path.dirname(os.__file__)]
    monkeypatch.setattr(sys, "path", ["/driver", "", *installed, "/editable"])
    installed_first()
    assert sys.path == ["/driver", "", *installed, "/editable"]  # this is no worker
    monkeypatch.setattr(sys, "argv", ["/x/ray/_private/workers/default_worker.py", "--a"])
    installed_first()
    assert sys.path == [*installed, "/editable", "/driver", ""]


def test_a_worker_in_a_clone_of_the_repository_uses_the_installed_package(tmp_path: Path) -> None:
    """Ray puts the driver's current folder in front."""
    installed, clone = tmp_path / "site-packages", tmp_path / "clone"
    for folder in (installed, clone):
        shutil.copytree(ROOT / "ray_soup", folder / "ray_soup", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import sys
sys.argv[0] = "default_worker.py"
sys.path.insert(0, {str(clone)!r})
from ray_soup.recipe import load
import ray_soup
print(load.__file__, ray_soup.__file__, ray_soup.task.functions.PACKAGE, ray_soup.__version__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True,
    )  # fmt: skip
    package = installed / "ray_soup"
    assert done.stdout.split()[:3] == [str(package / "recipe" / "load.py"), str(package / "__init__.py"), str(package)], done
