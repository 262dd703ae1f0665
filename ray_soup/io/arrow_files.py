"""Files of the storage systems that `pyarrow.fs` opens and obstore does not, such as hdfs://, and of the Hub (hf://)."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.credentials import store_options
from ray_soup.io.hub_path import HubPath, is_hub
from ray_soup.io.hugging_face import HubFiles
from ray_soup.io.objects import RETRY, STORES, object_store
from ray_soup.io.redact import check_uri
from ray_soup.io.remote import Stat, storage_failed


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI, and the path in it; of object storage, too, for Ray Tune. Raises RecipeError."""
    scheme, _, path = uri.partition("://")
    kind = STORES.get(scheme)
    if kind is None or kind == "GCSStore":
        file = ArrowFile(uri)
        return file.system, file.path
    object_store(uri)  # which checks the URI
    options = store_options(kind, path.partition("/")[0])
    return (_s3 if kind == "S3Store" else _azure)(options), path.rstrip("/")


def _s3(options: dict[str, Any]) -> Any:
    """Open S3 as the environment and the profiles of AWS say."""
    from pyarrow import fs

    scheme, _, address = options.get("endpoint", "").rpartition("://")
    return fs.S3FileSystem(
        region=options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        anonymous="skip_signature" in options,
        endpoint_override=address or None,
        scheme=scheme or "https",
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=RETRY["max_retries"]),
    )


def _azure(options: dict[str, Any]) -> Any:
    """Open the account of Azure that the environment names, with its key, or by what its SDK finds."""
    from pyarrow import fs

    account = options.get("account_name") or os.environ["AZURE_STORAGE_ACCOUNT_NAME"]
    names = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY")
    key = next((os.environ[name] for name in names if os.environ.get(name)), None)
    return fs.AzureFileSystem(account, account_key=key)


class ArrowFile:
    """A file or folder at a URI. Its methods raise SoupError if the storage fails; the storage itself retries requests.

    Raises RecipeError if no file system is known for the URI.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        if is_hub(uri):
            HubPath.parse(uri)  # which refuses credentials, too
            self.system: Any = HubFiles()
            self.path = uri.partition("://")[2].rstrip("/")
            return
        check_uri(uri)
        from pyarrow import fs

        try:
            self.system, self.path = fs.FileSystem.from_uri(uri.rstrip("/"))
        except (ValueError, OSError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise RecipeError(f"{uri}: cannot open this storage ({reason}). Use s3://, gs://, az:// or hdfs://.") from error

    def stat(self) -> Stat | None:
        """Return size and version of a file; None if there is no such file."""
        with self._failures():
            found = self.system.get_file_info(self.path)
        return Stat(found.size, found.mtime_ns or 0) if found.is_file else None

    def is_folder(self) -> bool:
        """Return whether this is a folder."""
        from pyarrow import fs

        with self._failures():
            return bool(self.system.get_file_info(self.path).type == fs.FileType.Directory)

    def listed(self, recursive: bool) -> dict[str, Stat | None]:
        """Return what is in this folder by its relative path: files, and None for folders. Empty if it does not exist."""
        from pyarrow import fs

        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        with self._failures():
            found = self.system.get_file_info(selector)
        top = f"{self.path}/"
        return {f.path.removeprefix(top): Stat(f.size, f.mtime_ns or 0) if f.is_file else None for f in found}

    @cached_property
    def _file(self) -> Any:
        return self.system.open_input_file(self.path)

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return `nbytes` bytes at `offset`, or fewer at the end of the file."""
        with self._failures():
            return memoryview(self._file.read_at(nbytes, offset))

    def write(self, content: bytes | Path) -> None:
        """Write a file atomically: these bytes, or a copy of a local file."""
        from pyarrow import fs

        written = f"{self.path}.tmp"
        with self._failures():
            self.system.create_dir(posixpath.dirname(self.path), recursive=True)
            if isinstance(content, Path):
                fs.copy_files(str(content), written, fs.LocalFileSystem(), self.system)
            else:
                with self.system.open_output_stream(written) as out:
                    out.write(content)
            self.system.move(written, self.path)

    def remove(self) -> None:
        """Remove a file if it exists."""
        with self._failures(), suppress(FileNotFoundError):
            self.system.delete_file(self.path)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_failed(self.uri, str(error).partition("\n")[0]) from error
