"""Download the files of a list of URLs: several at a time, resumed after an interruption, verified when complete.

A file is called NAME.part until its size and, if the list has one, its SHA-256 have been verified.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.hashing import sha256_file
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.recipe.plain import shown
from ray_soup.recipe.yaml_reader import parse_yaml, read_text

AT_ONCE = 3  # downloads
PAUSES_S = (1, 2, 4, 8, 16)  # between attempts that received nothing
TIMEOUT_S = 60  # without a byte
CHUNK = 1 << 18  # bytes
MOST_FILES = 10_000
LOCK = ".fetch.lock"
LISTS = {  # Wortsman et al. 2022: CLIP ViT-B/32, fine-tuned on ImageNet
    "model-soups": [f"https://github.com/mlfoundations/model-soups/releases/download/v0.0.2/model_{i}.pt" for i in range(72)]
}
EXPECTED = "expected lines `URL [size in bytes] [SHA-256]`, or in YAML also entries with the keys url, size and sha256"


@dataclass(frozen=True)
class Item:
    """One file of a list."""

    url: str
    """http:// or https://."""
    size: int | None = None
    """Size in bytes, if the list has it."""
    sha256: str | None = None
    """64 hexadecimal digits, if the list has it."""

    @property
    def name(self) -> str:
        """File name: the last part of the URL's path."""
        return unquote(urlsplit(self.url).path).rpartition("/")[2]


def read_list(spec: str) -> list[Item]:
    """Read a list of files.

    Args:
        spec: the name of a built-in list, or a list file: YAML if its suffix says so, otherwise one entry per line.

    Raises RecipeError if the list cannot be read or an entry is wrong.
    """
    if spec in LISTS:
        return [Item(url) for url in LISTS[spec]]
    what = f"The list {spec}"
    if not os.path.lexists(spec):
        raise RecipeError(f"{spec} does not exist; expected a file, or a built-in list: {', '.join(LISTS)}. Check the path.")
    text = read_text(spec, what)
    is_yaml = spec.endswith((".yaml", ".yml"))
    entries: Any = parse_yaml(text, what, lambda keys: keys != ("size",)) if is_yaml else _lines(text)
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"{what} has no entries; {EXPECTED}. Add at least one.")
    if len(entries) > MOST_FILES:
        raise RecipeError(f"{what} has {len(entries):,} entries; expected at most {MOST_FILES:,}. Split it.")
    items = [_item(spec, entry) for entry in entries]
    _check_names(what, [item.name for item in items])
    return items


def _check_names(what: str, names: list[str]) -> None:
    """Check that no download would overwrite another or its partial file. Raises RecipeError."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice:
        raise RecipeError(
            f"{what} has two files called {twice}, and one would overwrite the other. Fetch them into different folders."
        )
    parts = {f"{name}.part" for name in names}.intersection(names)
    if parts:
        raise RecipeError(f"{what} has the file {min(parts)}, the name of a partial download. Fetch it into another folder.")


def _lines(text: str) -> list[str]:
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()) if line]


def _item(spec: str, entry: Any) -> Item:
    """Return the file of an entry. Raises RecipeError if the entry is wrong."""
    values: dict[str, Any] = {}
    if isinstance(entry, str):
        url, *rest = entry.split() or [""]
        sizes = [part for part in rest if re.fullmatch("[0-9]{1,18}", part)]
        digests = [part for part in rest if part not in sizes]
        values = {"url": url, "more": sizes[1:] + digests[1:]}
        values |= {"size": int(sizes[0])} if sizes else {}
        values |= {"sha256": digests[0]} if digests else {}
    elif isinstance(entry, dict):
        values = entry
    values = {key: value for key, value in values.items() if value not in (None, [])}
    url, size, sha256 = values.get("url", ""), values.get("size"), values.get("sha256", "")
    if (
        set(values) - {"url", "size", "sha256"}
        or not (isinstance(url, str) and _is_url(url))
        or not (size is None or (type(size) is int and 0 < size < 1 << 60))
        or not (isinstance(sha256, str) and re.fullmatch(r"([0-9a-fA-F]{64})?", sha256))
    ):
        raise RecipeError(
            f"The list {spec} has the entry {shown(entry)}; {EXPECTED}. Write it as in https://host/model_0.pt 350000000."
        )
    return Item(url, size, sha256.lower() or None)


def _is_url(url: str) -> bool:
    """Return whether this is an http(s) URL of printable ASCII, without credentials, whose last part is a file name."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError if it is not one
    except ValueError:
        return False
    name = Item(url).name
    return (
        re.fullmatch(r"https?://[^/]+/[!-~]*", url) is not None
        and bool(parts.hostname)
        and "@" not in parts.netloc
        and name not in ("", ".", "..", LOCK)
        and len(name.encode(errors="replace")) <= 240
        and re.search(r"[\x00-\x1f\x7f-\x9f]", name) is None
    )


class Download:
    """The download of one file into a folder.

    Other threads may read `done` and `total` (None while unknown), both in bytes, and set the event `stop` to end it.
    """

    def __init__(self, item: Item, folder: Path, stop: threading.Event) -> None:
        self.item, self.target = item, folder / item.name
        self.part = folder / f"{item.name}.part"
        self.total = item.size
        self.done = self._fetched()
        self._stop = stop

    def run(self) -> None:
        """Download the file, or verify it if it exists. Raises SoupError."""
        for file in (self.target, self.part):
            if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
                raise SoupError(f"{file} is not a regular file. Remove it, or fetch into another folder.")
        if self.target.exists():
            self._check(self.target, "Remove it, or fetch into another folder.", keep=True)
            self.done = self.total = self.target.stat().st_size
            return
        failures = 0
        while not self._stop.is_set():
            before = self.done
            try:
                self._receive()
                break
            except HTTPError as error:
                if error.code < 500 and error.code not in (408, 425, 429):
                    raise SoupError(
                        f"{self.item.url}: {error.code} {error.reason}. Check the address in the list."
                    ) from error
                reason = f"{error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:  # such as timeouts and dropped connections
                reason = str(error) or type(error).__name__
            failures = 0 if self.done > before else failures + 1
            if failures > len(PAUSES_S):
                raise SoupError(
                    f"{self.item.url} could not be fetched: {failures} attempts failed in {sum(PAUSES_S)} s; the last error "
                    f"was {reason}. Check the network, then rerun the same command to resume."
                )
            self._stop.wait(PAUSES_S[max(0, failures - 1)])
        if not self._stop.is_set():
            self._check(self.part, "The download was removed: rerun the command to fetch it again, or fix the list.")
            self.part.replace(self.target)

    def _fetched(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self) -> None:
        """Append the missing range to the partial file.

        Raises OSError or HTTPException if the connection fails, SoupError if another attempt would fail in the same way.
        """
        self.done = self._fetched()
        if self.done and self.done == self.total:
            return
        response = self._request()
        if response is None:
            return
        with response:
            resumes = self._begin(response)
            with open(self.part, "ab" if resumes else "wb") as file:
                while not self._stop.is_set() and (data := response.read(CHUNK)):
                    try:
                        file.write(data)
                        file.flush()
                    except OSError as error:
                        raise SoupError(
                            f"{self.part} could not be written ({error.strerror}). Free some disk space and rerun."
                        ) from error
                    self.done += len(data)
                    if self.total is not None and self.done > self.total:
                        raise SoupError(
                            f"{self.item.url} sends more than the {self.total:,} bytes expected. Fix the size or the "
                            "address in the list."
                        )
        if self.total is not None and self.done < self.total and not self._stop.is_set():
            raise ConnectionError(f"the connection ended after {self.done:,} of {self.total:,} bytes")

    def _request(self) -> HTTPResponse | None:
        """Request the missing range; return None if nothing is missing."""
        headers = {"User-Agent": "ray-soup", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={self.done}-"} if self.done else {}
        try:
            response: HTTPResponse = urlopen(Request(self.item.url, headers=headers), timeout=TIMEOUT_S)
        except HTTPError as error:
            if error.code != 416:
                raise
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if whole and int(whole[1]) == self.done and self.total in (None, self.done):
                self.total = self.done
                return None
            self.part.unlink()  # the partial file is longer than the whole one
            raise ConnectionError("the partial download does not belong to this file") from error
        return response

    def _begin(self, response: HTTPResponse) -> bool:
        """Return whether the response resumes the partial file. Raises SoupError for a wrong size or a full disk."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        resumes = response.status == 206 and found is not None and int(found[1]) == self.done
        self.done = self.done if resumes else 0
        length = found[2] if resumes and found else response.headers.get("Content-Length")
        total = int(length) if length and re.fullmatch("[0-9]{1,18}", length) else None
        if total is not None and self.total not in (None, total):
            self.part.unlink(missing_ok=True)
            raise SoupError(
                f"{self.item.url} has {total:,} bytes; expected {self.total:,}. Fix the size or the address in the list."
            )
        self.total = total if total is not None else self.total
        free = shutil.disk_usage(self.part.parent).free
        if self.total is not None and self.total - self.done > free:
            raise SoupError(
                f"{self.part} needs {self.total - self.done:,} more bytes, and the disk has {free:,} free. Free some disk "
                "space, then rerun the same command to resume."
            )
        return resumes

    def _check(self, file: Path, advice: str, keep: bool = False) -> None:
        """Verify size and hash. Raises SoupError, after removing the file unless `keep`, if one of them is wrong."""
        size = file.stat().st_size
        sha256 = sha256_file(str(file)) if self.item.sha256 else None
        wrong = None
        if self.total is not None and size != self.total:
            wrong = f"has {size:,} bytes; expected {self.total:,}"
        elif sha256 != self.item.sha256:
            wrong = f"has the SHA-256 {sha256}; expected {self.item.sha256}"
        if wrong:
            if not keep:
                file.unlink()
            raise SoupError(f"{self.target} (from {self.item.url}) {wrong}. {advice}")


def fetch(spec: str, out: str | Path, progress: ProgressCallback = no_progress) -> list[Path]:
    """Download the files of a list into the folder `out`; files that exist there are only verified.

    Returns the files in the order of the list. Progress is in bytes. Raises RecipeError if the list is wrong, and SoupError,
    which names the failed files, after all others have been downloaded.
    """
    items = read_list(spec)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise RecipeError(f"Another fetch is using {out}. Wait for it, or choose another folder.") from None
    except OSError as error:
        raise RecipeError(f"The folder {out} cannot be written: {error.strerror}. Choose another folder.") from error
    stop = threading.Event()
    downloads = [Download(item, folder, stop) for item in items]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        running = [pool.submit(download.run) for download in downloads]
        left = set(running)
        while left:
            _, left = wait(left, timeout=0.2)
            progress("fetching", *_progress(downloads))
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        lock.release()
        (folder / LOCK).unlink(missing_ok=True)
    _raise_failures(running, out)
    return [download.target for download in downloads]


def _raise_failures(running: list[Future[None]], out: str | Path) -> None:
    """Raise SoupError, which names the failed downloads; an unexpected error is raised unchanged."""
    failed = [error for future in running if (error := future.exception()) is not None]
    for error in failed:
        if not isinstance(error, SoupError):
            raise error
    if failed:
        complete = len(running) - len(failed)
        more = f"\n{complete} of {len(running)} files are in {out}; rerun the same command to fetch the others."
        raise SoupError("\n".join(map(str, failed[:5])) + (f"\nand {len(failed) - 5} more" if failed[5:] else "") + more)


def _progress(downloads: list[Download]) -> tuple[int, int]:
    """Return the bytes downloaded and in total; a file of unknown size counts as the mean of the others."""
    known = [download.total for download in downloads if download.total is not None]
    total = sum(known) + (len(downloads) - len(known)) * (sum(known) // max(1, len(known)))
    done = sum(download.done for download in downloads)
    return done, max(total, done, 1)
