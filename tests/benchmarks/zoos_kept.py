"""Results of the benchmark `zoos` that are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

Key = tuple[str, int, str, str]
"""Zoo, seed, name of the variant, and a digest of the zoo's code, its recipe and the variant's keys."""
Rows = dict[str, dict[str, float]]
"""Figures by row."""


def digest_of(files: Iterable[Path], *texts: str) -> str:
    """Hash the contents of files, and texts."""
    found = hashlib.sha256()
    for part in (*(file.read_bytes() for file in files), *(text.encode() for text in texts)):
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]


@dataclass
class Kept:
    """Finished results, one per line of a file: those that this version of the code made, or all."""

    file: Path
    any_version: bool = False
    code: str = ""
    found: dict[Key, Rows] = field(default_factory=dict)
    versions: dict[Key, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import ray_soup

        self.code = digest_of(sorted(Path(ray_soup.__file__).parent.rglob("*.py")))
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            try:
                kept = json.loads(line)
                key = (kept["zoo"], kept["seed"], kept["name"], kept["digest"])
                if kept["code"] == self.code or (self.any_version and self.versions.get(key) != self.code):
                    self.found[key], self.versions[key] = kept["rows"], kept["code"]
            except (ValueError, KeyError, TypeError):
                continue  # the end of a line that was being written when the machine went down

    def add(self, key: Key, rows: Rows, seconds: float) -> None:
        """Keep the rows of a finished run."""
        self.found[key], self.versions[key] = rows, self.code
        zoo, seed, name, digest = key
        line = {"zoo": zoo, "seed": seed, "name": name, "digest": digest, "code": self.code, "seconds": round(seconds, 1)}
        with self.file.open("a+", encoding="utf-8") as file:
            if file.tell() and not self.file.read_text(encoding="utf-8").endswith("\n"):
                file.write("\n")
            file.write(json.dumps({**line, "rows": rows}) + "\n")
            file.flush()
            os.fsync(file.fileno())
