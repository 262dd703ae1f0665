"""The order of the packages, the sizes of files and functions, and what may import Ray and torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "ray_soup"
ORDER = ["errors", "recipe", "io", "mixing", "task", "actors", "soups", "tune", "api", "exits", "cli"]
IMPORT_RAY = {
    f"actors/{name}.py" for name in ("metrics", "placement", "ray_session", "on_ray", "relays")
}  # and everything in tune/
TORCH_FREE = [
    "ray_soup",
    "ray_soup.errors",
    "ray_soup.recipe",
    *(
        f"ray_soup.io.{name}"
        for name in (
            "notebook",
            "pace",
            "progress",
            "redact",
            "environment",
            "signals",
            "disk",
            "cache",
            "storage",
            "sweeps",
            "fetch",
            "lease",
            "mirror",
            "hashing",
            "find",
            "ingredient",
            "check",
        )
    ),
    "ray_soup.actors.relays",
    "ray_soup.task.outcomes",
    "ray_soup.task.inspection",
    "ray_soup.soups.records",
    "ray_soup.soups.results",
    "ray_soup.soups.export",
    "ray_soup.soups.trackers",
    "ray_soup.soups.push",
    "ray_soup.soups.report.notebook",
    "ray_soup.soups.report.statistics",
    "ray_soup.soups.report.tables",
    "ray_soup.soups.report.console",
    "ray_soup.soups.report.json_log",
    "ray_soup.soups.report.ending",
    "ray_soup.soups.report.progress_bar",
    "ray_soup.soups.report.terminal",
    "ray_soup.exits",
    "ray_soup.cli",
]
LINES_IN_FILE, LINES_IN_FUNCTION = 400, 60
NO_FILES = (
    "os",
    "archive",
    "Image",
    "self.group",
    "self.peers",
    "distribution",
)
"""They open no text file, or always in UTF-8."""


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_between_rooms() -> Counter[tuple[str, str]]:
    """How many modules of each room import from each other room."""
    found: Counter[tuple[str, str]] = Counter()
    for path in modules():
        for target in {name.split(".")[1] for name in imports(path) if name.startswith("ray_soup.")}:
            if target in ORDER and target != room_of(path):
                found[room_of(path), target] += 1
    return found


def test_a_package_imports_only_what_stands_to_its_left() -> None:
    assert {room_of(path) for path in modules()} == set(ORDER)
    for importer, imported in imports_between_rooms():
        assert ORDER.index(imported) < ORDER.index(importer), f"{importer} imports {imported}"


def test_numba_is_imported_where_the_folder_of_its_cache_is_chosen() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix() for path in modules() for name in imports(path) if name.startswith("numba")
    }
    assert found == {"mixing/compiled.py"}


def test_modules_of_a_package_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set()
        for target in imports(path):
            parts = target.split(".")
            for end in range(len(parts), 1, -1):
                file = ROOT.joinpath(*parts[:end])
                if file.with_suffix(".py").exists():
                    graph[name].add(".".join(parts[:end]))
                    break
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join((*path, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_ray_is_imported_in_five_modules_of_actors_and_in_tune_only() -> None:
    for path in modules():
        where = str(path.relative_to(PACKAGE))
        if any(name.split(".")[0] == "ray" for name in imports(path)):
            assert where in IMPORT_RAY or room_of(path) == "tune", f"{where} imports Ray"


def test_files_and_functions_stay_small() -> None:
    too_long = []
    for path in modules():
        where, text = path.relative_to(ROOT), path.read_text()
        count = len(text.splitlines())
        if count > LINES_IN_FILE:
            too_long.append(f"{where}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > LINES_IN_FUNCTION:
                    too_long.append(f"{where}:{node.lineno} {node.name}: {length} lines")
    assert not too_long, "\n".join(too_long)


def text_files(path: Path) -> Iterator[str]:
    """The calls that open a text file without an encoding, apart from files of the kernel."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("open", "read_text", "write_text"):
            call, owner = ast.unparse(node), ast.unparse(node.func).rpartition(".")[0]
            named = any(k.arg in ("encoding", "errors") for k in node.keywords)
            binary = re.search(r"'[rwxa][b+]*b[b+]*'", call) is not None
            ours = (isinstance(node.func, ast.Name) and node.func.id != "open") or owner in NO_FILES
            if not (named or binary or ours or "'/proc/" in call or "'/sys/" in call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {call}"


def test_text_files_are_in_utf_8_whatever_the_locale_is() -> None:
    found = [line for path in modules() for line in text_files(path)]
    assert not found, "\n".join(found)


def test_torch_and_ray_are_not_loaded_before_they_are_needed() -> None:
    """Importing the torch-free modules loads neither torch nor Ray; test_imports.py has the same for commands."""
    script = "; ".join(f"import {module}" for module in TORCH_FREE)
    check = "import sys; heavy = [m for m in ('torch', 'ray', 'numba') if m in sys.modules]; assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; {check}"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def main() -> None:
    """Print lines by package and imports between packages."""
    lines = Counter(dict.fromkeys(ORDER, 0))
    for path in modules():
        lines[room_of(path)] += len(path.read_text().splitlines())
    files = Counter(room_of(path) for path in modules())
    for room in ORDER:
        print(f"{room:<10} {files[room]:>3} files {lines[room]:>6,} lines")
    between = imports_between_rooms()
    print(f"{sum(files.values())} files, {sum(lines.values()):,} lines, {len(between)} imports between packages")
    for (importer, imported), count in sorted(between.items(), key=lambda item: [ORDER.index(r) for r in item[0]]):
        print(f"  {importer:<10} -> {imported:<10} {count:>3} modules")


if __name__ == "__main__":
    main()
