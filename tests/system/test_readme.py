"""The Python code in the README: its imports exist, and blocks that need no files run."""

import ast
import re

from tests.conftest import ROOT


def test_the_python_blocks_of_the_readme_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        if "mix_state_dicts" in block:
            exec(compile(block, "README.md", "exec"), names)
            continue
        imports = [node for node in ast.parse(block).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), names)
