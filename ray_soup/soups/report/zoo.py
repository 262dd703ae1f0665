"""Terminal output about fine-tuned checkpoints. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_soup.soups.report.terminal import echo


def print_zoo(
    entries: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]], out: str, was_complete: bool = False
) -> None:
    """Print the fine-tuned checkpoints, how many training runs failed, and, unless all had been made before, where."""
    for entry in entries:
        accuracy = f"  held-out accuracy {entry['accuracy']:.2%}" if "accuracy" in entry else ""
        echo(f"{entry['file']}  lr {entry['lr']:.1e}  epochs {entry['epochs']}{accuracy}")
    if failures:
        echo(f"{len(failures)} more failed ({out}/state/failures.json). The first error: {failures[0]['error']}")
    if not was_complete:
        echo(f"Wrote {len(entries)} checkpoints and manifest.json to {out}.")
