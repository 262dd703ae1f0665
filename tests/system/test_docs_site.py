"""The documentation as a site, and every block of code in it, run as a reader would run them on tiny files."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import ray_soup as public
from ray_soup.cli import main
from tests import tiny
from tests.adapters import make_adapter
from tests.conftest import ROOT, ray_soup, values
from tests.pages import PAGES, Block, blocks, shell_commands
from tests.system.command import call
from tests.unit.task import library_models as tiny_models
from tests.unit.task.language_models import byte_tokenizer, llama, saved

pytestmark = pytest.mark.slow

SMALLER = {
    "open_clip:ViT-B-32": "open_clip:tiny-clip",
    '"ViT-B-32"': '"tiny-clip"',
    "classes=1000": "classes=3",
    "vit_small_patch16_224": "test_vit",
    "classes=100": "classes=3",
    "resnet50": "shufflenet_v2_x0_5",
    "classes=10": "classes=3",
    "length=256": "length=16",
    "length=1024": "length=64",
    "max_length=384": "max_length=16",
    "num_samples=8": "num_samples=1",
}
"""What stands in the pages, and what is run instead, so that it takes seconds."""
MIXES = ("learn", "compare", "search", "schedule")
"""Commands that take minutes: their OUT is made by `uniform`, without data. tests/ray runs them."""
WITHOUT_DATA = ("data.fit=null", "data.select=0.2", "data.test=null")
READS = ("inspect", "verify", "keys", "doctor", "export", "resume")
"""Commands that are run as they stand."""


# What the reader of each page has


def write_zoo(models: list[nn.Module], pattern: str) -> None:
    """Write each model with torch.save, or as safetensors, to the pattern with its number."""
    for number, model in enumerate(models):
        file = Path(pattern.format(number))
        file.parent.mkdir(parents=True, exist_ok=True)
        write = save_file if file.suffix == ".safetensors" else torch.save
        write(model.state_dict(), file)  # type: ignore[operator]


def of_open_clip() -> None:
    from ray_soup.task.models import build

    tiny_models.add_tiny_clip(Path.cwd())
    Path("classes.txt").write_text("cat\ndog\ncow\n")
    tiny_models.write_epochs(tiny_models.zoo_of(tiny_models.clip, tiny_models.clip_logits), Path("logs"))
    torch.manual_seed(0)
    write_zoo([build("open_clip:tiny-clip?classes=3").model for _ in range(2)], "zoo/{}.safetensors")


def of_timm() -> None:
    import timm

    tiny_models.write_with_timm([timm.create_model("test_vit", num_classes=3) for _ in range(2)], Path("output"))


def of_torchvision() -> None:
    import torchvision

    name = "shufflenet_v2_x0_5"
    write_zoo([torchvision.models.get_model(name, num_classes=3) for _ in range(2)], "runs/{}/model_3.pth")


def of_lightning() -> None:
    for number in range(2):
        network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        folder = Path(f"lightning_logs/version_{number}/checkpoints")
        folder.mkdir(parents=True)
        torch.save(tiny_models.lightning(network.state_dict()), folder / "epoch=3-step=12.ckpt")


def of_texts() -> None:
    words = tiny_models.tokenizer(Path("words"))
    for number in range(2):
        tiny_models.bert().save_pretrained(f"runs/{number}")
        words.save_pretrained(f"runs/{number}")


def of_language_models() -> None:
    saved(llama(), byte_tokenizer(), Path("base-model"))
    for number in range(2):
        torch.manual_seed(number)
        saved(llama(), byte_tokenizer(), Path(f"runs/{number}/checkpoint-500"))


def of_adapters() -> None:
    saved(llama(), byte_tokenizer(), Path("base-model"))
    for number in range(2):
        base = llama()
        base.name_or_path = str(Path("base-model").absolute())
        make_adapter(base, Path(f"runs/{number}"), number, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def of_one_run() -> None:
    for step in (500, 1000):
        saved(llama(), byte_tokenizer(), Path(f"run/checkpoint-{step}"))


def of_own_model() -> None:
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    write_zoo([nn.Sequential(*layers) for _ in range(2)], "zoo/{}.pt")


def of_answers() -> None:
    tiny_models.write_questions(Path.cwd())


def of_finished_runs() -> None:
    """A soup in `out`, and one in `soups`, of the digits."""
    of_digits()
    for out in ("out", "soups"):
        assert call("uniform", "recipe.yaml", out, *WITHOUT_DATA).exit_code == 0


def of_digits() -> None:
    """A zoo of digits, the function model:build, and a recipe for both."""
    Path("zoo").mkdir()
    tiny.write_data(Path())
    tiny.write_zoo(Path("zoo"), 3)
    Path("model.py").write_text("from tests.tiny import build\n")
    recipe = values(Path.cwd(), model="model:build", learn__epochs=1)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def nothing() -> None:
    """The page makes its own files, or its blocks need none."""


WORKSPACES: dict[str, Callable[[], None]] = {
    "README.md": of_open_clip,
    "docs/cluster-plan.md": of_digits,
    "docs/data.md": nothing,
    "docs/keys.md": nothing,
    "docs/libraries/causal-lm.md": of_language_models,
    "docs/libraries/lightning.md": of_lightning,
    "docs/libraries/lora.md": of_adapters,
    "docs/libraries/open_clip.md": of_open_clip,
    "docs/libraries/own-model.md": of_own_model,
    "docs/libraries/timm.md": of_timm,
    "docs/libraries/torchvision.md": of_torchvision,
    "docs/libraries/transformers-text.md": of_texts,
    "docs/methods.md": nothing,
    "docs/one-run.md": of_one_run,
    "docs/output.md": of_finished_runs,
    "docs/own-methods.md": of_digits,
    "docs/own-objectives.md": of_answers,
    "docs/own-tuner.md": of_digits,
    "docs/python-api.md": of_digits,
}


def smaller(text: str) -> str:
    for name, instead in SMALLER.items():
        text = text.replace(name, instead)
    return text


def run_block(block: Block, space: dict[str, object]) -> None:
    """Write a block to the file that it names, or run it: in the namespace of its page, or in a process that starts Ray."""
    text = smaller(block.text)
    if block.file:
        Path(block.file).write_text(text)
    elif block.language == "python" and "recipe.yaml" in text:
        run_process([sys.executable, "-c", text])
    elif block.language == "python":
        exec(compile(text, str(block), "exec"), space)
    for words in shell_commands(block) if block.language == "sh" else ():
        run_command([smaller(word) for word in words])


def run_process(command: list[str]) -> str:
    """Run what starts Ray in a process of its own, in the current folder; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def run_command(words: list[str]) -> None:
    if words[:2] == ["ray-soup", "fetch"] or "jobs/" in " ".join(words):
        return  # the 72 checkpoints of Model Soups
    if any(word.startswith("my_methods:") for word in words):
        run_process(ray_soup(*words[1:]))
        return
    if words[0] == "ray-soup" and words[1] in MIXES and Path(words[2]).exists() and not Path(words[3]).exists():
        done = call("uniform", words[2], words[3], *WITHOUT_DATA)
    elif words[0] == "ray-soup" and words[1] in READS:
        done = call(*words[1:])
    else:
        return
    assert done.exit_code == 0, f"{words}: {done.output}"


@pytest.mark.parametrize("page", WORKSPACES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    space: dict[str, object] = {"__name__": "page"}
    try:
        WORKSPACES[page]()
        for block in blocks(ROOT / page):
            run_block(block, space)
        for file in tmp_path.glob("*.py"):
            runpy.run_path(str(file))
    finally:
        for name in set(sys.modules) - before:
            if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).is_relative_to(tmp_path):
                del sys.modules[name]


def test_every_page_with_python_is_run() -> None:
    with_python = {str(page.relative_to(ROOT)) for page in PAGES if any(b.language == "python" for b in blocks(page))}
    assert with_python <= {*WORKSPACES, "docs/first-soup.md"}


def test_the_first_soup_is_made_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command in a process of its own, in an empty folder; the page's own loop has the accuracy of results.jsonl."""
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "docs" / "first-soup.md")
    for block in found:
        if block.file:
            Path(block.file).write_text(block.text)
    for words in (words for block in found if block.language == "sh" for words in shell_commands(block)):
        if words == ["mkdir", "zoo"]:
            Path("zoo").mkdir()
        elif words == ["python", "train.py"]:
            run_process([sys.executable, "train.py"])
        elif words[0] == "ray-soup" and words[1] in ("inspect", "plan", "learn", "verify"):
            print(run_process(ray_soup(*words[1:])))
    own_loop = [block.text for block in found if block.language == "python"][-1]
    row = json.loads(Path("out/results.jsonl").read_text().splitlines()[0])
    assert run_process([sys.executable, "-c", own_loop]).strip() == f"{row['test_accuracy']:.2%}"


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    """From a copy, as the generated pages are written into docs/."""
    for folder in ("docs", "cluster", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("_build", "generated"))
    for file in ("README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "docs", "site"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    for name, texts in {
        "keys.html": ["learn.model_batch", "Number of ingredients whose coordinates move at a time"],
        "commands.html": [*main.commands, "Exit with code 4 if the soup does not beat the best ingredient on select."],
        "python-api.html": [f'id="ray_soup.{name}"' for name in public.__all__],
        "errors.html": ["IngredientError", "Rerun the same command"],
    }.items():
        page = (tmp_path / "site" / name).read_text()
        assert [text for text in texts if text not in page] == []
