"""What the documentation names exists: links lead somewhere, recipes are read, commands are parsed."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from ray_soup.cli import main
from ray_soup.errors import RecipeError
from ray_soup.recipe import dump_recipe, load_recipe, make_recipe, parse_overrides
from tests.conftest import ROOT
from tests.pages import DOCS, PAGES, Block, all_blocks, anchors, blocks, links, shell_commands

TEXTS = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md"))]
LANGUAGES = ("python", "sh", "text", "yaml")
OTHER_COMMANDS = {
    "pip install": "installs packages; CI runs README's line in a fresh environment",
    "pytest": "is the suite itself",
    "python -m venv": "makes an environment",
    ". .venv/bin/activate": "belongs to it",
    "sphinx-build": "is run by a test of its own",
    "mkdir zoo": "is run with its page",
    "python train.py": "is run with its page",
    "ray job submit": "is run by tests/system/test_jobs.py",
}
"""Commands in blocks of shell that are not ray-soup, with the reason why they are there."""


def names(items: list[Path] | list[Block]) -> list[str]:
    return [str(item.relative_to(ROOT) if isinstance(item, Path) else item) for item in items]


@pytest.mark.parametrize("page", TEXTS, ids=names(TEXTS))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    missing = []
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        target, _, anchor = unquote(link).partition("#")
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(link)
    assert missing == []


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {line for block in blocks(DOCS / "index.md") for line in block.text.splitlines() if line[:1] not in ("", ":")}
    assert listed == {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES[1:]} - {"index"}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_block_has_a_language_that_is_tested(page: Path) -> None:
    assert not [str(b) for b in blocks(page) if b.language not in LANGUAGES and not b.language.startswith("{")]


RECIPES = all_blocks("yaml")


@pytest.mark.parametrize("block", RECIPES, ids=names(RECIPES))
def test_the_recipes_of_the_documentation_are_read(tmp_path: Path, block: Block) -> None:
    check_recipe(tmp_path, block.text)


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda file: file.name)
def test_the_recipes_of_jobs_are_read(tmp_path: Path, file: Path) -> None:
    check_recipe(tmp_path, file.read_text())


def check_recipe(folder: Path, text: str) -> None:
    """Load a recipe, or a part of one, with a change; its dump is the same recipe."""
    whole = text if re.search("^model:", text, re.MULTILINE) else f"model: a:b\n{text}"
    (folder / "r.yaml").write_text(whole)
    recipe = load_recipe(folder / "r.yaml")
    assert load_recipe(folder / "r.yaml", ["learn.lr=0.02"]).learn.lr == 0.02
    (folder / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(folder / "again.yaml") == recipe


COMMANDS = all_blocks("sh")


@pytest.mark.parametrize("block", COMMANDS, ids=names(COMMANDS))
def test_the_commands_of_the_documentation_are_parsed(block: Block) -> None:
    for words in shell_commands(block):
        if words[0] == "ray-soup":
            parse(words[1:])
        else:
            assert any(" ".join(words).startswith(other) for other in OTHER_COMMANDS), words


def parse(words: list[str]) -> click.Context:
    """Parse the arguments of `ray-soup` by its own command, and its KEY=VALUE by the recipe."""
    parent = click.Context(main, info_name="ray-soup")
    context = main.commands[words[0]].make_context(words[0], words[1:], parent=parent)
    make_recipe({"model": "a:b"} | parse_overrides(context.params.get("overrides", ())))
    return context


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(click.UsageError, match="No such option"):
        parse(["learn", "r.yaml", "out", "--lerning"])
    with pytest.raises(RecipeError, match=r"did you mean 'learn\.lr'"):
        parse(["learn", "r.yaml", "out", "learn.lrr=1"])


def test_every_command_is_in_the_table_of_commands() -> None:
    table = (DOCS / "commands.md").read_text()
    missing = [name for name in main.commands if not re.search(rf"`(ray-soup )?{name}\b", table)]
    assert missing in ([], ["completion"]), missing


def test_the_table_of_faults_names_modules_functions_and_tests_that_exist() -> None:
    rows = [line.split("|")[2:4] for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    named = [(where, test) for where, test in rows if "`" in test]
    assert len(named) > 25
    sources = {f: f.read_text() for f in (ROOT / "tests").rglob("test_*.py")}
    for where, test in named:
        modules = re.findall(r"`([\w/]+\.py)`", where)
        assert modules or "." in where, where
        assert all((ROOT / "ray_soup" / module).exists() for module in modules), where
        code = "".join((ROOT / "ray_soup" / m).read_text() for m in modules)
        assert all(f"def {name}(" in code for name in re.findall(r"`, `(\w+)`", where)), where
        for name in re.findall(r"`([^`]+)`", test):
            name = name.rstrip(".")
            file = any(str(f).endswith(name) for f in sources)
            assert file or any(f"def {name}" in text for text in sources.values()), name
