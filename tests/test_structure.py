"""A module imports only modules above it in reading order."""

import ast

from tests.conftest import ROOT

ORDER = str.split(
    "errors recipe cache storage sweeps checkpoints fetch running_statistics preprocess blocks models objective sources "
    "data outcomes kernels kernels_cuda directions hyperplane shard train actors coefficients learn greedy bake figures "
    "report folder pipeline state_dicts plan compare finetune search soups demo cli"
)
MAY_IMPORT_RAY = {"actors", "finetune", "search"}


def test_modules_import_only_modules_above_them() -> None:
    modules = {path.stem for path in (ROOT / "ray_soup").glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    for name in ORDER:
        above = set(ORDER[: ORDER.index(name)])
        for node in ast.walk(ast.parse((ROOT / "ray_soup" / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported = {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                continue
            for target in imported:
                parts = target.split(".")
                if parts[0] == "ray_soup" and parts[1] in ORDER:
                    assert parts[1] in above, f"{name} imports {parts[1]}"
                if parts[0] == "ray":
                    assert name in MAY_IMPORT_RAY, f"{name} imports Ray"
