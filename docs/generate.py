"""The generated pages of the documentation: every key, command, public name and error message, as the code has them."""

from __future__ import annotations

import ast
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click

import ray_soup
from ray_soup import errors
from ray_soup.cli import main
from ray_soup.recipe.keys import keys

COMMON = {"--json", "--traceback", "--log-format", "--help"}
"""Options of every command, which the page explains once."""
KINDS = ("SoupError", "RecipeError", "IngredientError", "DiskError")


def write(folder: Path) -> None:
    """Write the generated pages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the generated pages (Markdown) by their file names."""
    return {
        "keys.md": list_of_keys(),
        "commands.md": list_of_commands(),
        "names.md": list_of_names(),
        "session.md": session_of_methods(),
        "messages.md": list_of_messages(),
    }


def list_of_keys() -> str:
    """Return a section for each recipe key: those at the top level first, then those of each section of a recipe."""
    groups: dict[str, list[str]] = {"": ["## Top level\n"]}
    for key in keys():
        if not key.default:  # a section
            groups[key.name] = [f"## Section `{key.name}`\n\n{_text(key.meaning)}\n"]
            continue
        example = f" Example: {_code(key.example)}." if key.example else ""
        facts = f"Expects {_text(key.type)}. Default: {_text(key.default)}.{example}"
        section = key.name.rpartition(".")[0]
        group = groups.setdefault(section, [f"## Section `{section}`\n"])
        group.append(f"### `{key.name}`\n\n{_text(key.meaning)}\n\n{facts}\n")
    return "\n".join(text for group in groups.values() for text in group)


def list_of_commands() -> str:
    """Return a section for each command: its usage, its text and its options."""
    parent = click.Context(main, info_name="ray-soup", max_content_width=100)
    return "\n".join(_command(name, main.commands[name], parent) for name in sorted(main.commands))


def _command(name: str, command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, info_name=name, parent=parent)
    options = [p for p in command.params if isinstance(p, click.Option) and not COMMON & set(p.opts)]
    records = [record for option in options if (record := option.get_help_record(context))]
    rows = "".join(f"| {_cell(_code(option))} | {_cell(_text(text))} |\n" for option, text in records)
    usage = f"ray-soup {name} {' '.join(command.collect_usage_pieces(context))}"
    paragraphs = "\n\n".join(_text(" ".join(p.split())) for p in (command.help or "").replace("\b", "").split("\n\n"))
    table = f"\n| option | meaning |\n| --- | --- |\n{rows}" if rows else ""
    return f"## `{name}`\n\n```text\n{usage}\n```\n\n{paragraphs}\n{table}"


def list_of_names() -> str:
    """Return directives of Sphinx that document every public name: functions first, then classes."""
    found: dict[str, list[str]] = {"autofunction": [], "autoclass": [], "autoexception": []}
    for name in ray_soup.__all__:
        value = getattr(ray_soup, name)
        error = isinstance(value, type) and issubclass(value, Exception)
        found["autoexception" if error else "autoclass" if isinstance(value, type) else "autofunction"].append(name)
    titles = {"autofunction": "Functions", "autoclass": "Classes", "autoexception": "Exceptions"}
    return "\n".join(
        f"## {titles[kind]}\n\n```{{eval-rst}}\n" + "\n".join(_directive(kind, name) for name in names) + "\n```\n"
        for kind, names in found.items()
    )


def _directive(kind: str, name: str) -> str:
    members = "   :members:\n" if kind == "autoclass" and name != "Recipe" else ""
    return f".. {kind}:: ray_soup.{name}\n{members}"


def session_of_methods() -> str:
    """Return the directive that documents what a method works with."""
    name = "ray_soup.soups.methods.interface"
    classes = "\n".join(f".. autoclass:: {name}.{one}\n   :members:\n" for one in ("Session", "IngredientInfo"))
    return f"## The session\n\n```{{eval-rst}}\n{classes}```\n"


def list_of_messages() -> str:
    """Return every message that users see, by exit code, with an ellipsis where a message has a value."""
    found: dict[str, set[str]] = defaultdict(set)
    package = Path(ray_soup.__file__).parent
    for file in sorted(package.rglob("*.py")):
        checks_recipes = file.is_relative_to(package / "recipe")
        for kind, message in _messages(ast.parse(file.read_text(encoding="utf-8")), checks_recipes):
            found[kind].add(message)
    texts = []
    for kind, messages in sorted(found.items(), key=lambda item: (getattr(errors, item[0]).exit_code, item[0])):
        code, meaning = getattr(errors, kind).exit_code, (getattr(errors, kind).__doc__ or "").splitlines()[0]
        texts.append(f"### `{kind}`: exit code {code}\n\n{_text(meaning)}\n\n{_listed(messages)}\n")
    other = {sentence.replace("{}", "…"): code for sentence, code in errors._BY_NAME.values()}
    texts += [
        f"### Other libraries: exit code {wanted}\n\n{_listed({text for text, code in other.items() if code == wanted})}\n"
        for wanted in (1, 2, 3)
    ]
    remedies = {f"…: {os.strerror(number)}. {remedy}" for number, remedy in errors._REMEDIES.items()}
    return "\n".join([*texts, f"### Files and disks: exit code 1\n\n{_listed(remedies)}\n"])


def _listed(messages: set[str]) -> str:
    return "\n".join(f"- {_text(message)}" for message in sorted(messages, key=_order))


def _messages(tree: ast.Module, checks_recipes: bool) -> Iterator[tuple[str, str]]:
    """Yield the exception and the message of every `raise` of this package's own exceptions.

    In the modules that check recipes, messages of ValueError, and those that are given a name first, belong to RecipeError.
    """
    for node in ast.walk(tree):
        value, kind = None, ""
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            kind, value = node.exc.func.id, node.exc.args[0] if node.exc.args else None
            kind = "RecipeError" if kind == "ValueError" and checks_recipes else kind
        elif checks_recipes and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "message":
            kind, value = "RecipeError", node.value
        if kind in KINDS and value is not None and (text := _template(value)):
            yield kind, text


def _template(node: ast.expr) -> str:
    """Return a text with an ellipsis for each of its values; empty if it is not written where it is raised."""
    if isinstance(node, ast.Constant):
        text = str(node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    else:
        return ""
    return " ".join(text.split()) if len(re.findall(r"\w{2,}", text)) > 2 else ""


def _order(message: str) -> str:
    return re.sub(r"\W+", " ", message).strip().lower()


def _text(text: str) -> str:
    """Escape what Markdown would read as markup, except for code in backticks, and wrap nothing."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>#{}$~])", r"\\\1", part) for part in parts)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
