"""The user's functions, which a recipe names as `package.module:function`: importing them, calling them, and their errors.

Whatever such a function does wrong becomes a RecipeError with the last lines of its own traceback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ray_soup.errors import RecipeError, SoupError

MOVED = {"ray_soup.demo:digits_vit": "ray_soup.tune.demo:digits_vit"}
"""Functions of this package that recipes of earlier versions name, and their current places."""
EXPECTED = {
    "model": "model() without required arguments that returns a torch.nn.Module, or (model, preprocess)",
    "loss": "loss(outputs, targets) that maps float32 [n, ...] and targets [n, ...] to losses [n], or to their sum",
    "metric": "metric(outputs, targets) that maps float32 [n, ...] and targets [n, ...] to scores [n]",
    "evaluate": "evaluate(folder) that returns a dictionary of names and finite numbers",
    "preprocess": "preprocess(image) that maps a PIL image in RGB to an array or tensor, always of one shape",
    "objective": "a class derived from ray_soup.Objective",
    "method": "method(session) that maps a ray_soup.Session to coefficients [K] or [K, B], to tensors by name, or to a file",
    "data": "dataset() without required arguments that returns a sequence of pairs (input, label)",
}
"""The signature of the function under each recipe key."""
ARGUMENTS = {"model": 0, "preprocess": 1, "loss": 2, "metric": 2, "evaluate": 1, "method": 1, "data": 0}
"""Number of arguments that the function under each recipe key is called with."""
LINES = 3
"""Maximum number of lines of a traceback in a message."""
PACKAGE = str(Path(__file__).parents[1])


def look_in(folder: str) -> None:
    """Put a folder on the module search path, behind the installed packages.

    A file such as `matplotlib.py` in the folder must not replace the library. In a process that is not this package's, such
    as a notebook or a script, a folder that is on the path stays where it is.
    """
    same = {folder, ""} if folder == _current_folder() else {folder}
    if _is_command() or _is_worker():
        sys.path[:] = [entry for entry in sys.path if entry not in same]
    if not same & {*sys.path}:
        sys.path.append(folder)


def installed_first() -> None:
    """In a worker process of Ray, put the driver's folders behind the installed packages: Ray puts them in front.

    If this package itself comes from such a folder, a clone of its repository, the installed one replaces it.
    """
    if not _is_worker():
        return
    sys.path[:] = _in_order(sys.path)
    name = __name__.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(name)
    if found is not None and found.origin and not os.path.samefile(os.path.dirname(found.origin), PACKAGE):
        for known in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[known]
        importlib.import_module(name)  # the current import returns what it finds in sys.modules at its end


@contextlib.contextmanager
def as_in_workers() -> Iterator[None]:
    """Find modules in the same order as worker processes: installed ones, then those of the current folder.

    Afterwards the path has its order back; entries that were added meanwhile, and the current folder, stay on it.
    """
    folder = _current_folder()
    if folder is not None:
        look_in(folder)
    before = sys.path.copy()
    sys.path[:] = _in_order(before)
    try:
        yield
    finally:
        now, known = sys.path.copy(), {*before}
        front = next((i for i, entry in enumerate(now) if entry in known), 0)
        kept, added = [e for e in before if e in now], [e for e in now[front:] if e not in known]
        sys.path[:] = [*now[:front], *kept, *added]


def _in_order(path: list[str]) -> list[str]:
    """Return a module search path with the entries before the first installed one behind all others."""
    own = next((i for i, entry in enumerate(path) if is_installed(entry)), 0)
    return [*path[own:], *path[:own]]


def _is_worker() -> bool:
    return os.path.basename(sys.argv[0] if sys.argv else "") == "default_worker.py"


def _is_command() -> bool:
    """Return whether this process runs the command `ray-soup`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = os.path.basename(sys.argv[0] if sys.argv else "")
    return name == "ray-soup" or getattr(spec, "name", None) == "ray_soup.cli.__main__"


@functools.cache
def is_installed(path: str) -> bool:
    """Return whether a file or folder belongs to Python, to an installed package, or to this package."""
    whole = os.path.realpath(path) + os.sep
    if f"{os.sep}site-packages{os.sep}" in whole or f"{os.sep}dist-packages{os.sep}" in whole:
        return True
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(whole.startswith(os.path.realpath(place) + os.sep) for place in [*places, PACKAGE])


def import_function(spec: str, key: str = "") -> Callable[..., Any]:
    """Import `package.module:function`; modules in the current folder are found after installed ones.

    Args:
        spec: the function.
        key: the recipe key that names it, as in `loss` or `data.fit`.

    Raises RecipeError if the module cannot be imported, is another one in worker processes, or has no such function, or if
    the function cannot be called with the arguments that belong to the key.
    """
    module_name, _, name = MOVED.get(spec, spec).partition(":")
    where = f"{key}: {spec}" if key else spec
    if module_name == "__main__":
        raise RecipeError(
            f"{where} is defined in a notebook or a script, from which the processes that Ray starts cannot import it. Move "
            f"it into a file in the current folder, such as mine.py, and write mine:{name}; or use "
            "ray_soup.mix_state_dicts, which takes models and data themselves."
        )
    with as_in_workers():
        module = call(key, spec, _imported, module_name, where)
        _check_same_in_workers(module_name.partition(".")[0], where)
    try:
        function = call(key, spec, getattr, module, name)
    except RecipeError as error:
        if not isinstance(error.__cause__, AttributeError):
            raise
        raise RecipeError(
            f"{where}: the module {module_name} has no '{name}' (it is {_file_of(module)}). "
            + (_hidden(module_name, module) or "Define it there, or fix the name in the recipe.")
        ) from None
    if not callable(function):
        raise RecipeError(f"{where} is {_a(function)}; expected {_expected(key)}. Name a function.")
    _check_signature(function, key, where)
    checked: Callable[..., Any] = function
    return checked


def call(key: str, spec: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the user's. What it prints goes to stderr, because stdout is for results.

    Args:
        key: the recipe key that names it.
        spec: its name in the recipe.
        function: the function, or a method of what it returned.
        arguments: its arguments.

    Raises RecipeError if it raises anything, including SystemExit.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return function(*arguments)
    except (KeyboardInterrupt, GeneratorExit, SoupError):
        raise
    except BaseException as error:
        if _passes(error):
            raise
        raise RecipeError(failure(key, spec, error)) from error


def failure(key: str, spec: str, error: BaseException) -> str:
    """Describe an error of a user's function: its name, the error, its own last lines, and what was expected."""
    where = f"{key}: {spec}" if key else spec
    lines = "".join(f"\n    {line}" for line in own_lines(error))
    return f"{where} {_raised(error)}{lines}\nExpected {_expected(key)}. Fix the function."


def own_lines(error: BaseException, only: bool = False) -> list[str]:
    """Return the last lines of an error's traceback that are the user's own code: file, line, function, code.

    If there are none, these are the last lines of installed packages, or none if `only`.
    """
    ours = ("<frozen", importlib.__file__, PACKAGE + os.sep)
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    own = [frame for frame in theirs if not is_installed(frame.filename)] or ([] if only else theirs)
    lines = [f"{_short(f.filename)}, line {f.lineno}, in {f.name}" + (f": {f.line}" if f.line else "") for f in own[-LINES:]]
    if isinstance(error, SyntaxError) and error.filename:
        code = (error.text or "").strip()
        lines = [*lines, f"{_short(error.filename)}, line {error.lineno}" + (f": {code}" if code else "")][-LINES:]
    return [line if len(line) <= 300 else f"{line[:300]}..." for line in lines]


def _imported(module_name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise  # the module exists, and imports one that does not
        hidden = _hidden(module_name, sys.modules.get(module_name.partition(".")[0]))
        raise RecipeError(
            f"{where}: the module {module_name} cannot be imported ({error}). "
            + (hidden or "Put it in the current folder or the job's working directory, or install it.")
        ) from error


def _check_same_in_workers(name: str, where: str) -> None:
    """Check that a module, which this process may have imported long ago, is the one that worker processes find."""
    file = getattr(sys.modules.get(name), "__file__", None)
    found = importlib.machinery.PathFinder.find_spec(name)
    theirs = found.origin if found is not None and found.has_location else None
    if file and theirs and os.path.realpath(file) != os.path.realpath(theirs):
        raise RecipeError(
            f"{where}: {name} is {file} in this process, and {theirs} in the processes that Ray starts, because installed "
            "modules come first there. Rename yours, and change the recipe."
        )


def _hidden(module_name: str, module: ModuleType | None) -> str:
    """Explain that an installed module hides one of the same name in the current folder; empty if none does."""
    first, folder = module_name.partition(".")[0], _current_folder() or ""
    for path in (os.path.join(folder, f"{first}.py"), os.path.join(folder, first)):
        file = _file_of(module)
        if module is not None and os.path.exists(path) and not os.path.realpath(file).startswith(os.path.realpath(path)):
            return f"The installed {first} ({file}) hides {path}: rename yours, and change the recipe."
    return ""


def _check_signature(function: Callable[..., Any], key: str, where: str) -> None:
    count = ARGUMENTS.get(key.partition(".")[0])
    if count is None:
        return
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some functions written in C have none
        return
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        raise RecipeError(
            f"{where} has the signature {signature}, and is called with {count or 'no'} arguments ({error}). "
            f"Expected {_expected(key)}. Give its other parameters default values, or name another function."
        ) from None


def _passes(error: BaseException) -> bool:
    """Return whether an error is not the function's: an exit by a signal's handler, or too little memory on a device."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, SystemExit):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    while frames and frames[-1].f_code.co_name == "exit" and is_installed(frames[-1].f_code.co_filename):
        frames.pop()  # libraries such as W&B put a function of theirs in the place of sys.exit
    raised_in = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return len(frames) > 1 and raised_in.partition(".")[0] in ("ray", "ray_soup")


def _raised(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    if isinstance(error, SystemExit):
        return f"tried to exit the program: sys.exit({text})"
    text = text if len(text) <= 500 else f"{text[:500]}..."
    return f"raised {type(error).__name__}{': ' if text else ''}{text}"


def _expected(key: str) -> str:
    return EXPECTED.get(key.partition(".")[0], "a function")


def _a(value: object) -> str:
    return "the module" if isinstance(value, ModuleType) else f"of type {type(value).__name__}"


def _file_of(module: ModuleType | None) -> str:
    return getattr(module, "__file__", None) or "built into Python"


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _short(file: str) -> str:
    folder = _current_folder()
    return os.path.relpath(file, folder) if folder and file.startswith(folder + os.sep) else file
