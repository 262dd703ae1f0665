"""Files by a list of addresses: several at a time, each gone on with where it was cut off, whole or not there.

A file lies in NAME.part until its size and, where the list says one, its SHA-256 fit.
"""

from __future__ import annotations

import http.client
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import yaml
from filelock import FileLock, Timeout

from ray_soup.checkpoints import sha256_file
from ray_soup.errors import RecipeError, SoupError

AT_ONCE = 3
PAUSES_S = (1, 2, 4, 8, 16)  # between one try that brought nothing and the next
TIMEOUT_S = 60  # without a byte
CHUNK = 1 << 18  # bytes
LISTS = {  # Wortsman et al. 2022: CLIP ViT-B/32, fine-tuned on ImageNet
    "model-soups": [f"https://github.com/mlfoundations/model-soups/releases/download/v0.0.2/model_{i}.pt" for i in range(72)]
}
EXPECTED = "a line is `URL [size in bytes] [SHA-256]`; in YAML an entry is that or has the keys url, size, sha256"


@dataclass(frozen=True)
class Item:
    """A file of the list; its size in bytes and SHA-256 where they are known."""

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.url).path).rpartition("/")[2]


def read_list(spec: str) -> list[Item]:
    """The files of a built-in list, or of one on the disk, plain or YAML. Raises RecipeError."""
    if spec in LISTS:
        return [Item(url) for url in LISTS[spec]]
    try:
        text = Path(spec).read_text()
        entries: Any = yaml.safe_load(text) if spec.endswith((".yaml", ".yml")) else _lines(text)
    except FileNotFoundError:
        raise RecipeError(f"{spec} does not exist; expected a file, or a built-in list: {', '.join(LISTS)}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"The list {spec} cannot be read: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"The list {spec} names no files; {EXPECTED}.")
    items = [_item(spec, entry) for entry in entries]
    names = [item.name for item in items]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RecipeError(f"The list {spec} has two files called {twice}; they would lie in one place. Fetch them apart.")
    return items


def _lines(text: str) -> list[str]:
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()) if line]


def _item(spec: str, entry: Any) -> Item:
    if isinstance(entry, str):
        url, *rest = entry.split()
        sizes = [part for part in rest if part.isdigit() and len(part) < 64]
        digests = [part for part in rest if part not in sizes]
        entry = {"url": url, "more": sizes[1:] + digests[1:]}
        entry |= {"size": int(sizes[0])} if sizes else {}
        entry |= {"sha256": digests[0]} if digests else {}
    values = {key: value for key, value in entry.items() if value not in (None, [])} if isinstance(entry, dict) else {}
    url, size, sha256 = str(values.get("url", "")), values.get("size"), str(values.get("sha256", "")).lower()
    item = Item(url, size, sha256 or None)
    if (
        set(values) - {"url", "size", "sha256"}
        or not re.match(r"https?://[^/]+/", url)
        or item.name in ("", ".", "..")
        or not (size is None or (isinstance(size, int) and size > 0))
        or not re.fullmatch(r"([0-9a-f]{64})?", sha256)
    ):
        raise RecipeError(f"The list {spec} has the entry {entry!r}; {EXPECTED}, as in https://host/model_0.pt 350000000.")
    return item


class Download:
    """One file on its way into `folder`."""

    def __init__(self, item: Item, folder: Path, stop: threading.Event):
        self.item, self.target = item, folder / item.name
        self.part = folder / f"{item.name}.part"
        self.total = item.size
        self.done = self.part.stat().st_size if self.part.exists() else 0
        self._stop = stop

    def run(self) -> None:
        """Raises SoupError."""
        if self.target.exists():
            self._check(self.target, "Remove it, or fetch into another folder.", keep=True)
            self.done = self.total = self.target.stat().st_size
            return
        tries = 0
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
            except (OSError, http.client.HTTPException) as error:  # timeouts and cut connections among them
                reason = str(error) or type(error).__name__
            tries = 0 if self.done > before else tries + 1
            if tries > len(PAUSES_S):
                raise SoupError(
                    f"{self.item.url} could not be fetched, {tries} times in {sum(PAUSES_S)} s: {reason}. Check the "
                    "network; the same command goes on from here."
                )
            self._stop.wait(PAUSES_S[max(0, tries - 1)])
        if not self._stop.is_set():
            self._check(self.part, "It was removed: fetch it again, or correct the list.")
            self.part.replace(self.target)

    def _receive(self) -> None:
        """What is missing, by range. Raises OSError or HTTPException where the connection fails, SoupError where another
        try would end the same way."""
        self.done = self.part.stat().st_size if self.part.exists() else 0
        if self.done and self.done == self.total:
            return
        headers = {"User-Agent": "ray-soup", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={self.done}-"} if self.done else {}
        try:
            response = urlopen(Request(self.item.url, headers=headers), timeout=TIMEOUT_S)
        except HTTPError as error:
            if error.code != 416:
                raise
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if whole and int(whole[1]) == self.done and self.total in (None, self.done):
                self.total = self.done
                return
            self.part.unlink()  # longer than the file is
            raise ConnectionError("what was fetched before does not belong to this file") from error
        with response:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            goes_on = response.status == 206 and found is not None and int(found[1]) == self.done
            self.done = self.done if goes_on else 0
            length = found[2] if goes_on and found else response.headers.get("Content-Length")
            total = int(length) if length else None
            if total is not None and self.total not in (None, total):
                self.part.unlink(missing_ok=True)
                raise SoupError(
                    f"{self.item.url} has {total:,} bytes; expected {self.total:,}. Correct the list, or the address."
                )
            self.total = total if total is not None else self.total
            free = shutil.disk_usage(self.part.parent).free
            if self.total is not None and self.total - self.done > free:
                raise SoupError(
                    f"{self.part} takes {self.total - self.done:,} more bytes and the disk has {free:,}. Free some room and "
                    "run the same command again."
                )
            with open(self.part, "ab" if goes_on else "wb") as file:
                while not self._stop.is_set() and (data := response.read(CHUNK)):
                    try:
                        file.write(data)
                        file.flush()
                    except OSError as error:
                        raise SoupError(f"{self.part} could not be written ({error.strerror}). Free some room.") from error
                    self.done += len(data)
        if self.total is not None and self.done < self.total and not self._stop.is_set():
            raise ConnectionError(f"the connection ended after {self.done:,} of {self.total:,} bytes")

    def _check(self, file: Path, advice: str, keep: bool = False) -> None:
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


def fetch(spec: str, out: str | Path, watch: Callable[[str, int, int], None] = lambda what, done, total: None) -> list[Path]:
    """Fetch the files of a list into the folder `out`; what is there already is left. Returns the files in the order of the
    list. Raises RecipeError for a bad list, SoupError that names the files that failed once all others are there."""
    items = read_list(spec)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".fetch.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise RecipeError(f"Another fetch is at work in {out}. Wait for it, or choose another folder.") from None
    except OSError as error:
        raise RecipeError(f"The folder {out} cannot be written: {error.strerror}.") from error
    stop = threading.Event()
    downloads = [Download(item, folder, stop) for item in items]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        running = {pool.submit(download.run): download for download in downloads}
        left = set(running)
        while left:
            _, left = wait(left, timeout=0.2)
            watch("fetching", *_progress(downloads))
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        lock.release()
        (folder / ".fetch.lock").unlink(missing_ok=True)
    failed = [error for future in running if (error := future.exception()) is not None]
    for error in failed:
        if not isinstance(error, SoupError):
            raise error
    if failed:
        more = f"\n{len(items) - len(failed)} of {len(items)} files are in {out}; the same command goes on with the others."
        raise SoupError("\n".join(map(str, failed[:5])) + (f"\nand {len(failed) - 5} more" if failed[5:] else "") + more)
    return [download.target for download in downloads]


def _progress(downloads: list[Download]) -> tuple[int, int]:
    """Bytes fetched, and in all; files whose size is not known yet count as the mean of the others."""
    known = [download.total for download in downloads if download.total is not None]
    total = sum(known) + (len(downloads) - len(known)) * (sum(known) // max(1, len(known)))
    done = sum(download.done for download in downloads)
    return done, max(total, done, 1)
