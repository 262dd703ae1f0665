"""Check the archive of a state that this package wrote with `torch.save`."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO


def check_archive(file: Path | IO[bytes]) -> None:
    """Check the checksums in a torch file, which `torch.load` ignores. Raises ValueError, or zipfile.BadZipFile."""
    with zipfile.ZipFile(file) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed")
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"the checksum of {wrong} does not match")
    if not isinstance(file, Path):
        file.seek(0)
