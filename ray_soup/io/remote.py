"""What all kinds of remote storage have in common: what is known of a file, and the error of a storage that fails."""

from __future__ import annotations

from dataclasses import dataclass

from ray_soup.errors import SoupError


@dataclass(frozen=True)
class Stat:
    """Size and version of a file."""

    size: int
    """Bytes."""
    version: int
    """Modification time in ns."""


def storage_failed(uri: str, reason: str, attempts: str = "") -> SoupError:
    """Return the error of a storage that failed at a URI, after these attempts if there were several."""
    return SoupError(
        f"The storage failed at {uri}{attempts}: {reason}. Check that the storage is up and that this machine's credentials "
        "are valid there; then rerun the same command."
    )
