"""URIs of the Hugging Face Hub: hf://ORG/NAME@REVISION/PATH, and hf://datasets/ORG/NAME@REVISION/PATH."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from ray_soup.errors import RecipeError
from ray_soup.io.redact import redact

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9_.-]+"
_URI = re.compile(
    rf"hf://(?:(datasets|models)/)?({_NAME}/{_NAME})(?:@(refs/(?:pr|convert)/[\w.-]+|[^\s/@?&]+))?(?=[/?&]|$)", re.ASCII
)
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubPath:
    """A file or folder of a repository."""

    kind: str
    """model or dataset."""
    repo: str
    """ORG/NAME."""
    revision: str
    """A branch, tag or commit."""
    inside: str
    """The path in the repository; empty for all of it."""

    @classmethod
    def parse(cls, uri: str) -> HubPath:
        """Split a URI. Raises RecipeError."""
        found = _URI.match(uri)
        inside = "" if found is None else uri[found.end() :].strip("/")
        if found is None or found[2].partition("/")[0] in ("datasets", "models", "spaces", "buckets"):
            raise RecipeError(
                f"{redact(uri)} names no repository of the Hugging Face Hub; expected hf://ORG/NAME, hf://ORG/NAME@REVISION/"
                "PATH or hf://datasets/ORG/NAME/PATH, with a pattern in PATH only. Credentials belong in HF_TOKEN. Fix it."
            )
        revision = unquote(found[3] or "main")
        for part in (revision, inside) if inside else (revision,):
            if {"", ".", ".."} & set(part.split("/")):
                raise RecipeError(f"{uri}: {part!r} is no path in a repository. Fix it.")
        return cls((found[1] or "models").removesuffix("s"), found[2], revision, inside)

    @staticmethod
    def rest(uri: str) -> str:
        """Return what follows the repository and the revision in a URI: a path, a query, or both."""
        found = _URI.match(uri)
        assert found is not None
        return uri[found.end() :]

    def __str__(self) -> str:
        repo = f"{'datasets/' if self.kind == 'dataset' else ''}{self.repo}@{self.revision}"
        return f"{SCHEME}{repo}{'/' if self.inside else ''}{self.inside}"

    @property
    def options(self) -> dict[str, Any]:
        """The arguments by which `huggingface_hub` finds the repository."""
        return {"repo_id": self.repo, "repo_type": self.kind, "revision": self.revision}


def is_hub(path: str) -> bool:
    """Return whether a path is a URI of the Hugging Face Hub."""
    return path.startswith(SCHEME)


def without_commit(path: str) -> str:
    """Return a URI of the Hub without its commit, for names; any other path unchanged."""
    return re.sub(rf"@{COMMIT.pattern}(?=/|$)", "", path) if is_hub(path) else path
