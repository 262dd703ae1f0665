"""The soups of a finished comparison that OUT/state keeps, so that more seeds or subsets can be added to it later."""

from __future__ import annotations

from contextlib import suppress

from ray_soup.errors import RecipeError
from ray_soup.io.disk import read_json, write_json, writing
from ray_soup.recipe import TRAINED, is_function, own_function
from ray_soup.soups.output import Output
from ray_soup.soups.own_evaluation import function_record
from ray_soup.soups.session import Session


def check_unchanged(session: Session, output: Output) -> None:
    """Check that data and code are those of the soups that OUT/state keeps; record them if there are none.

    Raises RecipeError if examples, the model, or a function of the user's have changed since.
    """
    file, now = output.state("soups", "contents.json"), {**_code(session), **session.setup.contents}
    with suppress(FileNotFoundError, ValueError):  # ValueError: a damaged record says nothing
        before = read_json(file)
        changed = [f"the examples of {source}" for source in session.setup.contents if before.get(source) != now[source]]
        changed += [name for name in _code(session) if before.get(name) != now[name]]
        if changed:
            raise RecipeError(
                f"{output.uri_of()} was begun before {changed[0]} changed. Choose a new folder, or add --overwrite to "
                "replace what is there."
            )
        return
    with writing(file):
        file.parent.mkdir(exist_ok=True)
    write_json(file, now)


def _code(session: Session) -> dict[str, str]:
    """Return digests of the model, and of the files of the recipe's functions, by what messages call them."""
    recipe = session.recipe
    functions = {"loss": recipe.loss, "objective": recipe.objective, "preprocess": recipe.preprocess}
    functions["method"] = own_function(recipe.method)
    found = {
        f"the code of {spec}": function_record(spec, key).get("sha256", "")
        for key, spec in functions.items()
        if isinstance(spec, str) and is_function(spec)
    }
    return {"the model, or the code of it or of the metric": session.setup.fingerprint, **found}


def drop_states(output: Output) -> None:
    """Delete what the finished soups no longer need: the states of their learning, and whole differences of weights."""
    with suppress(OSError):
        for pattern in ("*.pt", "*.best*.safetensors", f"{TRAINED}_*.difference.safetensors"):
            for file in output.state("soups").glob(pattern):
                file.unlink()
