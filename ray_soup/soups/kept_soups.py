"""The soups of a finished comparison that OUT/state keeps, so that more seeds or subsets can be added to it later."""

from __future__ import annotations

from contextlib import suppress

from ray_soup.errors import RecipeError
from ray_soup.io.disk import read_json, write_json, writing
from ray_soup.recipe import TRAINED
from ray_soup.soups.output import Output
from ray_soup.soups.session import Session


def check_examples(session: Session, output: Output) -> None:
    """Check that the data are those of the soups that OUT/state keeps; record them if there are none.

    Raises RecipeError if examples have changed since.
    """
    file, now = output.state("soups", "contents.json"), session.setup.contents
    with suppress(FileNotFoundError, ValueError):  # ValueError: a damaged record says nothing
        before = read_json(file)
        changed = [source for source in now if before.get(source) != now[source]]
        if changed:
            raise RecipeError(
                f"{output.uri_of()} was started with other examples: those of {changed[0]} have changed since. Choose a new "
                "folder, or add --overwrite to replace what is there."
            )
        return
    with writing(file):
        file.parent.mkdir(exist_ok=True)
    write_json(file, now)


def drop_states(output: Output) -> None:
    """Delete what the finished soups no longer need: the states of their learning, and whole differences of weights."""
    with suppress(OSError):
        for pattern in ("*.pt", f"{TRAINED}_*.difference.safetensors"):
            for file in output.state("soups").glob(pattern):
                file.unlink()
