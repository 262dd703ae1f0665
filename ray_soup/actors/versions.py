"""What has to be equal on all actors of a run: the versions that it depends on, and the examples."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

from ray_soup import __version__
from ray_soup.actors.messages import SetupInfo
from ray_soup.errors import RecipeError

EVERYWHERE = "install one version on all nodes, or send it with the job: `ray job submit --runtime-env-json`"


def own_versions() -> dict[str, str]:
    """Return the versions of ray_soup, torch and Python in this process."""
    return {"ray_soup": __version__, "torch": str(torch.__version__), "Python": platform.python_version()}


def compare_versions(infos: Sequence[SetupInfo]) -> tuple[str, ...]:
    """Return a note for each library of which an actor has another version than this process.

    Raises RecipeError if it is ray_soup: its messages and the order of its sums may differ.
    """
    notes = []
    for name, mine in own_versions().items():
        other = [info for info in infos if info.versions.get(name) != mine]
        if not other:
            continue
        if name == "ray_soup":
            found = ", ".join(sorted({f"{info.versions.get(name, 'an unknown one')} on {info.node}" for info in other}))
            raise RecipeError(
                f"The actors have another version of ray_soup than the driver: found {found}; expected {mine}, as on the "
                f"driver. {EVERYWHERE[0].upper()}{EVERYWHERE[1:]}."
            )
        versions = " and ".join(sorted({info.versions.get(name, "an unknown version") for info in other}))
        some = f"{len(other)} of {len(infos)} actors {'has' if len(other) == 1 else 'have'}"
        notes.append(f"{some} {name} {versions}, the driver {mine}: a run on other nodes may differ in the last bits.")
    return tuple(notes)


def check_examples(first: SetupInfo, infos: Sequence[SetupInfo]) -> None:
    """Raise RecipeError if actors hold other examples than the first one of the run."""
    for info in infos:
        for name, digest in info.examples.items():
            if digest != first.examples.get(name):
                raise RecipeError(
                    f"data.{name}: an actor on {info.node} has other examples than the first actor, on {first.node}. Every "
                    "actor reads the data itself: let a function that draws at random use a fixed seed, let all nodes see "
                    "the same files, and leave these alone during a run."
                )
