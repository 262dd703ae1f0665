"""Write local files atomically, and choose how many threads read them.

Every file that is read again is written through `write_bytes`: it appears complete under its name, with the permissions that
the umask leaves, and never through a symbolic link. A disk that is full, broken or read-only becomes a DiskError that names
the file.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ray_soup.errors import DiskError, SoupError
from ray_soup.io.redact import redact, redact_uris

if TYPE_CHECKING:
    import numpy as np

LARGEST_RECORD = 1 << 28
"""Bytes of the largest JSON file that is read."""
READ_AGAIN = ("recipe", "ingredients", "path", "name", "model_name", "folder", "source")
"""Keys of JSON files with paths, names and recipes, which must be read as they were written."""


def files_below(folder: Path) -> list[Path]:
    """Return the sorted files at any depth of a folder, none if it does not exist. Files and folders may come and go."""

    def failed(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    found = (Path(at, name) for at, _, names in os.walk(folder, onerror=failed) for name in names)
    return sorted(path for path in found if path.is_file())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in this context into a DiskError that says why `path` could not be written and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        failed: BaseException | None = error
        while failed is not None and not isinstance(failed, OSError):
            failed = failed.__context__  # torch.save tries to end its archive after a failed write, and complains about that
        if failed is None:
            raise
        raise DiskError(f"{path} could not be written ({failed.strerror or failed}). {_remedy(failed, path)}") from failed


def _remedy(error: OSError, path: Path) -> str:
    """Say what to do about a failed write to `path`."""
    if error.errno == errno.EFBIG:
        return "Raise the limit on the size of files (ulimit -f), then rerun the same command."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Choose a folder that this process may write to."
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return "Check that disk, then rerun the same command."
    free = ""
    with suppress(OSError):
        folder = next(p for p in (path, *path.parents) if p.is_dir())
        free = f" ({shutil.disk_usage(folder).free:,} bytes are free)"
    return f"Free some disk space{free}, then rerun the same command."


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Replace a file atomically by what is written in this context: a reader sees the old content or the new, never a part.

    A symbolic link at `path` is replaced by the file; nothing is written to where it points. Raises DiskError if the file
    cannot be written; an OSError in the context counts as that.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # two processes may write one file
    with writing(path):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically, as `replacing` does. Raises SoupError."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, in UTF-8 and without credentials. Raises SoupError."""
    write_bytes(path, redact(text).encode(errors="backslashreplace"))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replace a JSON file atomically; see `json_text`. Raises SoupError."""
    write_bytes(path, json_text(value, indent).encode())


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as valid JSON on any platform: NaN and infinity become null, credentials are left out."""
    return json.dumps(_plain(value, {}), indent=indent, allow_nan=False)


def _plain(value: Any, shown: dict[str, str], exact: bool = False) -> Any:
    """Return a value in the types of JSON; `shown` remembers texts without their credentials.

    An `exact` text loses only the credentials in URIs.
    """
    if isinstance(value, str):
        if exact:
            return redact_uris(value)
        if value not in shown:
            shown[value] = redact(value)
        return shown[value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(str(key), shown): _plain(one, shown, key in READ_AGAIN) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one, shown, exact) for one in value]
    import numpy as np

    return _plain(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value), shown)


def read_json(path: Path) -> Any:
    """Read a JSON file; NaN, infinity and numbers beyond float64 are read as null.

    Raises FileNotFoundError if there is none, ValueError with a reason if it is anything else than a JSON file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a file")
        if found.st_size > LARGEST_RECORD:
            raise ValueError(f"it has {found.st_size:,} bytes; expected at most {LARGEST_RECORD:,}")
        return json_value(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def json_value(data: bytes | str) -> Any:
    """Return the value of JSON text; NaN, infinity and numbers beyond float64 become None. Raises ValueError."""

    def number(text: str) -> float | None:
        value = float(text)
        return value if math.isfinite(value) else None

    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(text, parse_float=number, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def write_array(path: Path, values: np.ndarray[Any, Any]) -> None:
    """Replace a `.npy` file atomically. Raises SoupError."""
    import numpy as np

    with io.BytesIO() as buffer:
        np.save(buffer, values)
        write_bytes(path, buffer.getvalue())


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """Read a `.npy` file. Raises SoupError if it is missing or damaged."""
    import numpy as np

    try:
        found: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SoupError(f"{path} is damaged ({error}). Remove it to compute it again.") from error
    return found


def write_at(file: IO[bytes], values: np.ndarray[Any, Any], offset: int) -> None:
    """Write an array into an open file; any thread may call this.

    Args:
        file: open for writing; its position is neither used nor moved.
        values: any dtype and shape; written in row-major order.
        offset: where to write, in bytes from the beginning of the file.
    """
    import numpy as np

    view = np.ascontiguousarray(values).view(np.uint8).data.cast("B")
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


def reading_threads(nbytes: int = 1) -> int:
    """Choose how many threads to read with if each one holds `nbytes` bytes.

    This is the number of cores that the CPU affinity of this process and its container's limit allow, or fewer, so that the
    threads together hold at most 1 GB.
    """
    cores = float(len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return max(1, min(math.ceil(cores), (1 << 30) // nbytes))
