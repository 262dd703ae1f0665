"""The recipe's function `evaluate`: what it is called with, what it may return, and where its values are shown."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from ray_soup.cli import main
from ray_soup.errors import RecipeError
from ray_soup.io.hashing import sha256_file
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import Recipe, dump_recipe, make_recipe, with_changes
from ray_soup.soups.identity import begun
from ray_soup.soups.output import Soup, open_output
from ray_soup.soups.own_evaluation import figures_of_folder, figures_of_soup
from ray_soup.soups.report.tables import legend, quality, table
from ray_soup.soups.run import run
from tests.conftest import values
from tests.unit.task.language_models import TEXTS, byte_tokenizer, llama, nudge, saved, sum_and_count


class Module:
    """A module of the user's in the current folder, with a name of its own: others of that name may be imported already."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.spec, self.file = name, f"{name}:evaluate", folder / f"{name}.py"

    def __call__(self, code: str) -> None:
        """Write the module, or edit it."""
        sys.modules.pop(self.name, None)
        self.file.write_text(code, encoding="utf-8")
        importlib.invalidate_caches()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Module(tmp_path, f"own_{time.monotonic_ns()}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text("{}")
    return made


def test_names_and_numbers_of_any_library_become_figures(module: Module, folder: Path) -> None:
    module(
        "import numpy as np, os\n"
        "def evaluate(folder):\n"
        "    print('to stderr')\n"
        "    os.chdir('/')\n"
        "    size = os.path.getsize(os.path.join(folder, 'model.safetensors'))\n"
        "    return {'pass@1': np.float32(0.5), 'F1, macro': 1, 'size': np.int64(size), 'größe': True + 0.25}\n"
    )
    here = Path.cwd()
    found = figures_of_folder(module.spec, folder)
    assert found == {"evaluate_pass@1": 0.5, "evaluate_F1, macro": 1, "evaluate_size": 7, "evaluate_größe": 1.25}
    assert {type(value) for value in found.values()} == {float}
    assert Path.cwd() == here


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("None", "returned nothing; expected a dictionary of names and finite numbers"),
        ("{}", "returned nothing; expected a dictionary"),
        ("0.5", "returned a float; expected a dictionary"),
        ("{'a': float('nan')}", r"returned nan \(float\) for 'a'; expected a finite number"),
        ("{'a': float('inf')}", r"returned inf \(float\) for 'a'; expected a finite number"),
        ("{'a': 10**400}", r"returned .* \(int\) for 'a'; expected a finite number"),
        ("{'a': True}", r"returned true \(bool\) for 'a'"),
        ("{'a': '0.5'}", r"returned '0.5' \(str\) for 'a'"),
        ("{'a': [0.5]}", r"returned \[0.5\] \(list\) for 'a'"),
        ("{'a': 1j}", r"returned 1j \(complex\) for 'a'"),
        ("{1: 0.5}", "returned a value named 1; expected 1 to 100 printable characters"),
        ("{'': 0.5}", "returned a value named ''; expected 1 to 100 printable characters"),
        ("{' a': 0.5}", "returned a value named ' a'"),
        ("{'a' * 101: 0.5}", "returned a value named 'aaa"),
        ("{'a\\n': 0.5}", "returned a value named"),
        ("{'a_sd': 0.5}", "returned a value named 'a_sd'; .* no _sd at the end, which marks standard deviations"),
        ("1 / 0", r"raised ZeroDivisionError: division by zero\n    own_\d+.py, line 2, in evaluate: "),
        ("exit(0)", r"tried to exit the program: sys.exit\(0\)\n    own_\d+.py, line 2"),
    ],
)
def test_anything_else_is_refused_with_the_name_of_the_function(
    module: Module, folder: Path, returned: str, said: str
) -> None:
    module(f"def evaluate(folder):\n    return {returned}\n")
    with pytest.raises(RecipeError, match=f"^evaluate: {module.spec} {said}"):
        figures_of_folder(module.spec, folder)


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("(folder / 'model.safetensors').write_bytes(b'WEIGHTS')", "changed .*/model.safetensors"),
        ("(folder / 'config.json').unlink()", "deleted .*/config.json"),
        ("(folder / 'new').mkdir(); (folder / 'new' / 'results.json').write_text('{}')", "added .*/new/results.json"),
    ],
)
def test_a_function_that_changes_the_folder_is_refused(module: Module, folder: Path, deed: str, said: str) -> None:
    module(
        f"from pathlib import Path\ndef evaluate(folder):\n    folder = Path(folder)\n    {deed}\n    return {{'a': 1}}\n"
    )
    with pytest.raises(
        RecipeError, match=f"^evaluate: {module.spec} {said}; expected it to leave the model's folder unchanged"
    ):
        figures_of_folder(module.spec, folder)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("{name}:missing", "evaluate: own_.*:missing: the module .* has no 'missing'"),
        ("no_such_module:evaluate", "evaluate: no_such_module:evaluate: the module no_such_module cannot be imported"),
        ("{name}:nothing", "has the signature .*, and is called with 1 arguments"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_is_computed(
    zoo: Path, tmp_path: Path, module: Module, key: str, said: str
) -> None:
    module("def nothing(): return {}\n")
    with pytest.raises(RecipeError, match=said):
        run(without_data(zoo, evaluate=key.format(name=module.name)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def without_data(zoo: Path, evaluate: str) -> Recipe:
    return make_recipe({**values(zoo), "method": "uniform", "data": {}, "evaluate": evaluate})


SUM = """
from pathlib import Path
from safetensors.torch import load_file

def evaluate(folder):
    with open({calls!r}, "a") as file:
        file.write(folder + "\\n")
    tensors = load_file(Path(folder, "model.safetensors"))
    return {{"accuracy": 0.25, "sum of |theta|": sum(float(t.abs().sum()) for t in tensors.values())}}
"""


@pytest.fixture
def own_soup(zoo: Path, tmp_path: Path, module: Module) -> Soup:
    module(SUM.format(calls=str(tmp_path / "calls")))
    return run(without_data(zoo, module.spec), tmp_path / "out")


def test_the_values_are_those_of_the_published_model_and_stand_wherever_figures_stand(
    own_soup: Soup, module: Module, tmp_path: Path
) -> None:
    found = figures_of_folder(module.spec, own_soup.out)
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert Path(first).match(f"{own_soup.out}/state/run-1/*/out")
    assert second == str(own_soup.out)
    row = json.loads((own_soup.out / "results.jsonl").read_text(encoding="utf-8"))
    assert {key: row[key] for key in found} == found
    assert len(found) == 2
    record = json.loads((own_soup.out / "run.json").read_text())
    assert record["evaluate"] == {"function": module.spec, "sha256": sha256_file(str(module.file))}
    shown = f"{found['evaluate_sum of |theta|']:.4g}"
    card, page = ((own_soup.out / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert "| model | accuracy | sum of &#124;theta&#124; |" in card
    assert f"| uniform | 0.25 | {shown} |" in card
    assert f"accuracy, sum of |theta|: computed by {module.spec} from the model&#39;s folder." in page
    assert f"<td>0.25</td><td>{shown}</td>" in page
    assert not (own_soup.out / "state" / "evaluate").exists()


def test_a_finished_run_is_not_evaluated_again(own_soup: Soup, module: Module, zoo: Path, tmp_path: Path) -> None:
    again = run(without_data(zoo, module.spec), tmp_path / "out")
    assert again.was_complete
    assert again.rows == own_soup.rows
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_values_are_kept_for_the_same_code_and_coefficients_only(
    zoo: Path, tmp_path: Path, folder: Path, module: Module
) -> None:
    """An edit of the function calls it again for every model: figures of two versions would not be comparable."""
    recipe, shapes = without_data(zoo, module.spec), {"weight": 0}
    coefficients = [Coefficients(np.array([[c], [1 - c]]), ("a", "b"), ("model",), shapes) for c in (0.5, 0.25)]
    with open_output(tmp_path / "out") as output:
        output.begin(begun(recipe, []))

        def figures(which: int) -> float:
            return figures_of_soup(recipe, output, "mehl", coefficients[which], lambda: nullcontext(folder))["evaluate_a"]

        counting = "from pathlib import Path\ncalls = Path(__file__).with_suffix('.calls')\ndef evaluate(folder):\n"
        counting += "    calls.open('a').write('x')\n    return {'a': calls.stat().st_size + SHIFT}\n"
        module(f"{counting}SHIFT = 0\n")
        assert [figures(0), figures(0), figures(1), figures(1), figures(0)] == [1, 1, 2, 2, 3]
        module(f"{counting}SHIFT = 10\n")
        assert [figures(0), figures(0)] == [14, 14]
        file = output.state("evaluate", "mehl.json")
        file.write_text(file.read_text().replace("14.0", "15.0"))
        with pytest.raises(RecipeError, match=r"mehl\.json is damaged .* Remove .*mehl\.json to call the function again\."):
            figures(0)


def test_a_refused_value_leaves_no_soup_and_the_command_ends_with_2(zoo: Path, tmp_path: Path, module: Module) -> None:
    module("def evaluate(folder):\n    raise ValueError('no benchmark here')\n")
    (tmp_path / "r.yaml").write_text(dump_recipe(without_data(zoo, module.spec)))
    done = CliRunner().invoke(main, ["uniform", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 2, done.output
    assert f"evaluate: {module.spec} raised ValueError: no benchmark here\n    {module.name}.py, line 2" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exit"] == 2
    assert not (tmp_path / "out").exists()
    module("def evaluate(folder):\n    return {'a': 1}\n")
    done = CliRunner().invoke(main, ["uniform", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--json"])
    assert json.loads(done.stdout.splitlines()[-1])["results"][0]["evaluate_a"] == 1


def test_names_that_look_like_our_own_figures_are_not_taken_for_them() -> None:
    """An accuracy is a share, shown in percent; a value of the function is shown as it was returned."""
    row = {"model_name": "uniform", "test_accuracy": 0.5, "test_nll": 1.0}
    own = {"evaluate_accuracy": 0.5, "evaluate_test_accuracy": 0.75, "evaluate_metric": 2.0, "evaluate_nll": 12345678.0}
    head, cells = table([row | own], quality([row | own]))
    assert head == ["model", "test %", "test NLL", "accuracy", "test_accuracy", "metric", "nll"]
    assert cells == [["uniform", "50.00", "1.0000", "0.5", "0.75", "2", "1.235e+07"]]
    text = legend({"examples": {"test": 3}, "evaluate": {"function": "a:b"}}, [row | own])
    assert "accuracy, test_accuracy, metric, nll: computed by a:b from the model's folder." in text
    assert "Metric: mean" not in text


def test_means_over_seeds_have_a_deviation() -> None:
    from ray_soup.soups.comparison import _mean

    rows = [{"evaluate_f1": value} for value in (0.5, 0.7)]
    found = _mean("mehl", rows)
    assert found["evaluate_f1"] == pytest.approx(0.6)
    assert found["evaluate_f1_sd"] == pytest.approx(math.sqrt(0.02))
    assert table([found], quality([found]))[1] == [["mehl", "0.6 ±0.1414"]]


def test_a_recipe_without_the_key_is_dumped_as_before(zoo: Path) -> None:
    assert "evaluate" not in yaml.safe_load(dump_recipe(make_recipe(values(zoo))))
    assert yaml.safe_load(dump_recipe(without_data(zoo, "a:b")))["evaluate"] == "a:b"


def test_a_search_cannot_vary_it(zoo: Path) -> None:
    with pytest.raises(RecipeError, match=r"search\.evaluate: a search cannot vary this key"):
        make_recipe({**values(zoo), "search": {"evaluate": {"choice": ["a:b", "c:d"]}}})


def write_llamas(folder: Path) -> tuple[Recipe, list[dict[str, torch.Tensor]]]:
    """Write three models near each other; the values are a recipe of their mean, without `evaluate`, and their weights."""
    thetas = []
    saved(llama(), byte_tokenizer(), folder / "init")
    for k in range(3):
        model = llama()
        nudge(model, k)
        saved(model, None, folder / "zoo" / str(k))
        thetas.append(model.state_dict())
    recipe = {"method": "uniform", "ingredients": str(folder / "zoo"), "model": f"transformers:{folder / 'init'}"}
    return make_recipe(recipe), thetas


def test_its_library_loads_a_model_of_transformers_from_the_folder(tmp_path: Path, module: Module) -> None:
    """The value is the library's own loss of the mean of the weights."""
    recipe, thetas = write_llamas(tmp_path)
    module(
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "def evaluate(folder):\n"
        "    model, words = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "    ids = words('The quick brown fox', return_tensors='pt')['input_ids']\n"
        "    with torch.inference_mode():\n"
        "        return {'loss': model(input_ids=ids, labels=ids).loss.item()}\n"
    )
    soup = run(with_changes(recipe, {"evaluate": module.spec}), tmp_path / "out")
    mean = llama()
    mean.load_state_dict({name: sum(theta[name].double() for theta in thetas) / 3 for name in thetas[0]})
    loss, count = sum_and_count(mean.eval(), byte_tokenizer()("The quick brown fox")["input_ids"])
    assert soup.rows[0]["evaluate_loss"] == pytest.approx(loss / count, rel=1e-6)


HARNESS = """
import lm_eval
from lm_eval.tasks import TaskManager

def evaluate(folder):
    found = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": folder, "dtype": "float32", "add_bos_token": False}, tasks=["notes"], device="cpu",
        batch_size=4, task_manager=TaskManager(include_path="tasks"), bootstrap_iters=0,
    )
    metrics = {f"{task} {name.partition(',')[0]}": v for task, of in found["results"].items() for name, v in of.items()}
    return {name: value for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}
"""
TASK = """
task: notes
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
metadata: {version: 1.0}
"""


@pytest.mark.slow
def test_a_task_of_the_evaluation_harness_has_the_bits_per_byte_of_the_librarys_own_loss(
    tmp_path: Path, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe, _ = write_llamas(tmp_path)
    texts = [text for text in TEXTS if len(text) > 1]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "notes.yaml").write_text(TASK)
    module(HARNESS)
    soup = run(with_changes(recipe, {"evaluate": module.spec}), tmp_path / "out")
    model, words = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), byte_tokenizer()
    loss = sum(sum_and_count(model, words(text)["input_ids"])[0] for text in texts)
    expected = loss / np.log(2) / sum(len(text.encode()) for text in texts)
    assert soup.rows[0]["evaluate_notes bits_per_byte"] == pytest.approx(expected, rel=1e-5)
