"""The exceptions that users see, each with its exit code, and a sentence for every other exception.

A message states what is wrong and where, what was found and expected, and what to do.
"""

from __future__ import annotations

import errno
import re
import signal
from typing import ClassVar


class SoupError(Exception):
    """A run failed after it had started (exit code 1); also the base class of the other exceptions."""

    exit_code = 1


class RecipeError(SoupError):
    """The usage, the recipe or the data is wrong (exit code 2)."""

    exit_code = 2


class IngredientError(SoupError):
    """An ingredient is broken, or the ingredients do not fit together (exit code 3)."""

    exit_code = 3


class DiskError(SoupError):
    """A file could not be written (exit code 1). Rerun the same command once the disk works."""


class OutputClosed(SoupError):
    """The reader of the standard output has ended (exit code 141, that of SIGPIPE)."""

    exit_code = 128 + signal.SIGPIPE


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end.

    Ray's waits pass on a KeyboardInterrupt only, and replace this one by a plain one: so the signal is kept on the class.
    """

    signal: ClassVar[int | None] = None
    """The first signal that asked this process to end."""
    handled: ClassVar[bool] = False
    """True once it has been raised."""


RERUN = "Rerun the same command to resume."
_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminal closed"}
_FREE_SPACE = "Free some disk space (and inodes), then rerun the same command."
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: "Your quota is used up: delete files or have it raised, then rerun the same command.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), then rerun the same command.",
    errno.EIO: "The disk or its connection failed: check it (dmesg), then rerun the same command.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.EACCES: "Change the permissions, or choose another place.",
    errno.EPERM: "Change the permissions, or choose another place.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n 65536), then rerun the same command.",
    errno.ENFILE: "The machine has too many open files: end other programs, then rerun the same command.",
    errno.ENOENT: "Check the path; if another program removed it, rerun the same command.",
    errno.ENOTDIR: "Check the path: part of it is a file.",
    errno.EISDIR: "Check the path: it is a folder.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ELOOP: "Check the path: its links point at each other.",
    errno.ENOMEM: "Free some memory, or use fewer actors, then rerun the same command.",
    errno.EAGAIN: "Raise the limit on processes (ulimit -u), or use fewer actors.",
    errno.ESTALE: "The network disk was disconnected: check it, then rerun the same command.",
}
_EXTRAS = ("timm", "torchvision", "transformers", "optuna", "wandb", "mlflow")
_MEMORY = "Use fewer actors (actors.replicas), a smaller learn.micro_batch, or a machine with more memory."
_BY_NAME: dict[str, tuple[str, int]] = {  # by the class, or a base class, as package.Name; {} is the first line of the text
    "torch.OutOfMemoryError": (
        "The GPU has too little memory: {}. Use a smaller learn.micro_batch, more actors.shards, or other GPUs.", 1,
    ),
    "ray.AuthenticationError": (
        "The Ray cluster refused this connection: {}. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token.", 2,
    ),
    "ray.OutOfMemoryError": (f"Ray ended a process because its node ran out of memory: {{}}. {_MEMORY}", 1),
    "ray.GetTimeoutError": (f"The Ray cluster did not answer in time: {{}}. {RERUN}", 1),
    "ray.RayError": (f"The Ray cluster failed: {{}}. Check it with `ray status`. {RERUN}", 1),
    "pydantic_core.ValidationError": ("A setting is not valid: {}. Fix it in the recipe.", 2),
    "yaml.YAMLError": ("The YAML is not valid: {}. Fix the file.", 2),
    "json.JSONDecodeError": ("A JSON file is damaged: {}. Restore it, or use another folder.", 1),
    "pyarrow.ArrowException": ("The data cannot be read: {}. Check the files of `data:`.", 2),
    "safetensors.SafetensorError": ("A safetensors file is damaged: {}. Copy or download it again.", 3),
    "pickle.UnpicklingError": ("A file is damaged, or holds more than tensors: {}. Copy or download it again.", 3),
    "zipfile.BadZipFile": ("A file is damaged: {}. Copy or download it again.", 3),
    "filelock.Timeout": (f"Another process holds a lock: {{}}. {RERUN}", 1),
    "concurrent.BrokenExecutor": (f"A helper process ended unexpectedly: {{}}. {_MEMORY}", 1),
    "builtins.MemoryError": (f"This process has too little memory (or is limited, see ulimit -v). {_MEMORY}", 1),
    "builtins.RecursionError": ("A file is nested too deeply, or a function of the recipe calls itself: {}.", 2),
    "builtins.UnicodeError": ("A text or a name is not UTF-8: {}. Rename the file, or save it as UTF-8.", 2),
}  # fmt: skip


def explain(error: BaseException) -> tuple[str, int]:
    """Return a sentence about any exception, and the exit code of `ray-soup` for it.

    What fails after a signal asked this process to end is a consequence of the signal.
    """
    if isinstance(error, KeyboardInterrupt) or Stopped.signal is not None:
        number = Stopped.signal or signal.SIGINT
        return f"{_SIGNALS.get(signal.Signals(number), 'stopped')}. {RERUN}", 128 + number
    if isinstance(error, SoupError):
        return str(error), error.exit_code
    if isinstance(error, SystemExit):
        return f"A function of the recipe, or a library, called sys.exit({error.code!r}). Remove the call.", 1
    cause = getattr(error, "cause", None)
    if type(error).__name__.startswith("RayTaskError") and isinstance(cause, BaseException):
        return explain(cause)
    if type(error).__name__.endswith("ExceptionGroup"):
        return explain(error.exceptions[0])  # type: ignore[attr-defined]
    places = [kind.__module__.lstrip("_").partition(".")[0].removesuffix("_rust") for kind in type(error).__mro__]
    names = [f"{place}.{kind.__name__}" for place, kind in zip(places, type(error).__mro__, strict=True)]
    for name in names:
        if name in _BY_NAME:
            sentence, code = _BY_NAME[name]
            return sentence.format(first_line(error)), code
    if isinstance(error, OSError):
        return _os_error(error), 1
    if isinstance(error, ImportError) and re.search("failed to map|annot allocate memory", str(error)):
        return _BY_NAME["builtins.MemoryError"]
    if isinstance(error, ImportError):
        return _import_error(error), 2
    return (
        f"Unexpected error at {place_of(error)}: {type(error).__name__}: {first_line(error)}. Rerun with --traceback for "
        "the whole traceback, and please report it.",
        1,
    )


def _os_error(error: OSError) -> str:
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    place = " -> ".join(files) or f"At {place_of(error)}"
    remedy = _REMEDIES.get(error.errno or 0, "Fix this, then rerun the same command.")
    return f"{place}: {error.strerror or first_line(error)}. {remedy}"


def _import_error(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in _EXTRAS:
        return f"The package {package} is not installed. Run pip install 'ray_soup[{package}]'."
    install = f"Run pip install {package}." if isinstance(error, ModuleNotFoundError) and package else "Reinstall it."
    return f"A package cannot be imported: {first_line(error)}. {install}"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 500 characters and without a full stop at the end."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    return re.sub(r"[.\s]+$", "", lines[0][:500]) if lines else type(error).__name__


def place_of(error: BaseException) -> str:
    """Return the place in the code that raised an exception, as `module:line`; the innermost one of this package, if any.

    For an exception that an actor raised, that is a place in the actor's code.
    """
    cause = error.__cause__
    text = str(cause) if type(cause).__name__.startswith("RayTaskError") else ""
    remote = re.findall(r'/(ray_soup/[\w/]+)\.py", line (\d+)', text)
    if remote:
        return f"{remote[-1][0].replace('/', '.')}:{remote[-1][1]}"
    found, trace = "", error.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"
        if place.startswith("ray_soup.") or not found.startswith("ray_soup."):
            found = place
        trace = trace.tb_next
    return found or "an unknown place"
