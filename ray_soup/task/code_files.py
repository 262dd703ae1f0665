"""The files that code comes from: installed packages with their versions, and the user's modules with what they import."""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray_soup.task.functions import is_installed

OUTSIDE_CALLS = ("exec", "eval", "__import__")
OUTSIDE_NAMES = (
    *("import_module", "environ", "getenv", "open", "load", "loadtxt", "genfromtxt", "fromfile", "memmap", "imread"),
    *("safe_load", "safe_open", "load_file"),
)
"""Names in code whose result depends on more than the code. Image.open, which decodes what it is given, is none of them."""
NOT_NAMES = ("LOAD_CONST", "LOAD_FAST", "LOAD_DEREF")
"""Instructions that load a constant or a variable of the function's own."""
OUTSIDE_PREFIX = "read_"
"""What names such as read_text and read_csv begin with."""
LIBRARIES = ("ray_soup", "torch", "torchvision", "timm", "open_clip", "transformers")
"""Libraries that count as installed wherever they are, as in an editable install."""


def hash_texts(*parts: str) -> str:
    """Hash a sequence of texts: SHA-256 in hex."""
    whole = hashlib.sha256()
    for part in parts:
        encoded = part.encode(errors="surrogatepass")
        whole.update(f"{len(encoded)} ".encode() + encoded)
    return whole.hexdigest()


# Installed packages


def is_of_library(file: str, module: str) -> bool:
    """Return whether a file, of a module of this name, is installed, a part of Python, or one of an editable library."""
    first = module.partition(".")[0]
    return is_installed(file) or (first in LIBRARIES and len(_distributions(first)) > 0)


@functools.cache
def version(module: str) -> str:
    """Describe the package that a module belongs to: its version and a hash of its files; Python's version for its own."""
    first = module.partition(".")[0]
    if first in sys.stdlib_module_names:
        return platform.python_version()
    found = getattr(sys.modules.get(first), "__version__", None)
    return f"{found if isinstance(found, str) else ''} {_contents(first)}"


@functools.cache
def _contents(first: str) -> str:
    """Hash a package's files: the list that its installer wrote, or the source if that does not list them."""
    module, distributions = sys.modules.get(first), _distributions(first)
    folders = [Path(folder) for folder in getattr(module, "__path__", [])]
    places = folders or [Path(file) for file in (getattr(module, "__file__", None),) if file]
    parents = {place.resolve().parent for place in places}
    recorded = [line for distribution in distributions for line in _recorded(distribution, first, parents)]
    if recorded:
        return hash_texts(*sorted(recorded))
    files = sorted((str(file.relative_to(folder)), file) for folder in folders for file in folder.rglob("*.py"))
    files = files or [("", place) for place in places]
    hashes = (text for name, file in files for text in (name, _hash_of(file)))
    return hash_texts(*(distribution.version for distribution in distributions), *hashes)


@functools.cache
def _distributions(first: str) -> Sequence[importlib.metadata.Distribution]:
    """Return the distributions that a top-level module belongs to."""
    try:
        named = importlib.metadata.distribution(first)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return [importlib.metadata.distribution(name) for name in sorted(set(_by_module().get(first, [])))]
    return [named]


@functools.cache
def _by_module() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def _recorded(distribution: importlib.metadata.Distribution, first: str, parents: set[Path]) -> list[str]:
    """Return the lines of RECORD, which have the SHA-256 of each file; none if the module in `parents` is not among them."""
    lines = (distribution.read_text("RECORD") or "").splitlines()
    if not any(line.startswith((f"{first}/", f"{first}.")) for line in lines):
        return []  # an editable install
    if parents and Path(str(distribution.locate_file(""))).resolve() not in parents:
        return []  # another copy
    return [line for line in lines if not line.startswith("..") and ".dist-info/" not in line and ".pyc," not in line]


def _hash_of(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


# The user's modules


class Sources:
    """The current source files of the user's modules; each is read once."""

    def __init__(self) -> None:
        self._folders = [Path(entry) for entry in sys.path if not is_installed(entry or os.curdir)]
        self._texts: dict[str, bytes | None] = {}
        self._imported: dict[tuple[str, str], list[tuple[str, str]]] = {}
        self._found: dict[tuple[str, Path], list[str]] = {}
        self._whole: dict[tuple[str, str], list[str]] = {}

    def hashes(self, file: str, module: str) -> list[str]:
        """Hash the source of a module of the user's and of the user's modules that it imports, directly or not."""
        if (file, module) not in self._whole:
            files = self._closure([(file, module)])
            self._whole[file, module] = sorted(
                hash_texts(os.path.basename(path), hashlib.sha256(text).hexdigest()) for path, text in files.items()
            )
        return self._whole[file, module]

    def read_outside(self, code: types.CodeType, module: str) -> bool:
        """Return whether code, or a module of the user's that it imports when it runs, may depend on more than the code."""
        if _reads_outside(code):
            return True
        package = _package(module, code.co_filename)
        start = self._files_of(_local_imports(code, package), code.co_filename, package)
        return any(_source_reads_outside(text) for text in self._closure(start).values())

    def _closure(self, coming: list[tuple[str, str]]) -> dict[str, bytes]:
        """Return the source files that can be reached by imports, by real path."""
        found: dict[str, bytes] = {}
        while coming:
            file, module = coming.pop()
            path = os.path.realpath(file)
            if not file.endswith(".py") or path in found or is_of_library(file, module):
                continue
            text = self._text(path)
            if text is None:
                continue
            found[path] = text
            if (file, module) not in self._imported:
                package = _package(module, file)
                self._imported[file, module] = self._files_of(_imports(text, package), file, package)
            coming.extend(self._imported[file, module])
        return found

    def _text(self, path: str) -> bytes | None:
        if path not in self._texts:
            try:
                self._texts[path] = Path(path).read_bytes()
            except OSError:
                self._texts[path] = None
        return self._texts[path]

    def _files_of(self, names: Sequence[str], file: str, package: str) -> list[tuple[str, str]]:
        """Return the file and the name of each module of the user's among `names`, which a file of `package` imports."""
        root = Path(file).parent
        for _ in range(package.count(".") + 1 if package else 0):
            root = root.parent
        return [(path, name) for name in names for folder in (root, *self._folders) for path in self._in(name, folder)]

    def _in(self, name: str, folder: Path) -> list[str]:
        if (name, folder) not in self._found:
            path = folder.joinpath(*name.split("."))
            candidates = (path.with_name(f"{path.name}.py"), path / "__init__.py")
            self._found[name, folder] = [str(candidate) for candidate in candidates if candidate.is_file()]
        return self._found[name, folder]


def _package(module: str, file: str) -> str:
    return module if os.path.basename(file) == "__init__.py" else module.rpartition(".")[0]


@functools.lru_cache(maxsize=1024)
def _imports(text: bytes, package: str) -> Sequence[str]:
    """Return the names of the modules that a source imports, also within functions, and of the packages around them."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= _imported_from(node.module or "", [alias.name for alias in node.names], node.level, package)
    return _with_packages(names)


def _local_imports(code: types.CodeType, package: str) -> Sequence[str]:
    """Return the names of the modules that code imports when it runs, and of the packages around them."""
    names: set[str] = set()
    for part in codes(code):
        steps = _steps(part)
        for n, step in enumerate(steps):
            if step.opname == "IMPORT_NAME":
                level, listed = (before.argval for before in steps[n - 2 : n])
                names |= _imported_from(step.argval, listed or (), level if isinstance(level, int) else 0, package)
    return _with_packages(names)


def _imported_from(module: str, listed: Sequence[str], level: int, package: str) -> set[str]:
    """Return what `from module import listed` may import; `level` is the number of leading dots."""
    above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
    start = ".".join([*above, *([module] if module else [])])
    return {start, *(f"{start}.{name}" if start else name for name in listed)}


def _with_packages(names: set[str]) -> Sequence[str]:
    return sorted({".".join(n.split(".")[:end]) for n in names if n for end in range(1, n.count(".") + 2)})


# What code reads


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield code and the code of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "CACHE")]


@functools.lru_cache(maxsize=4096)
def _reads_outside(code: types.CodeType) -> bool:
    """Return whether code may read files or the environment, or run text."""
    for part in codes(code):
        before: object = None
        for step in _steps(part):
            loads = step.opname.startswith(("LOAD_", "IMPORT_")) and not step.opname.startswith(NOT_NAMES)
            name = step.argval if loads and isinstance(step.argval, str) else ""
            if name in OUTSIDE_CALLS and step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                return True
            if name.startswith(OUTSIDE_PREFIX) or (name in OUTSIDE_NAMES and not (name == "open" and before == "Image")):
                return True
            before = step.argval
    return False


@functools.lru_cache(maxsize=1024)
def _source_reads_outside(text: bytes) -> bool:
    try:
        return _reads_outside(compile(text, "", "exec", dont_inherit=True))
    except (SyntaxError, ValueError, RecursionError):
        return True
