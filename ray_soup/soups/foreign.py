"""Rows of a comparison for soups that another library makes: PEFT's own merges of adapters."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from ray_soup.errors import IngredientError
from ray_soup.io.adapters import AdapterIngredient, open_adapter
from ray_soup.io.lifting import AdapterSet, group_of
from ray_soup.recipe import PEFT_MERGES
from ray_soup.soups.comparison import SoupResult
from ray_soup.soups.output import Output
from ray_soup.soups.records import read_entry, write_entry
from ray_soup.soups.session import Session
from ray_soup.task.outcomes import load_outcomes, save_outcomes
from ray_soup.task.peft_merges import NoMergeError, merge_with_peft
from ray_soup.task.peft_models import check_with_peft


@dataclass
class Foreign:
    """Results by the name of the row, and a note for each row that is missing."""

    results: dict[str, SoupResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def foreign_results(session: Session, output: Output, folder: Path) -> Foreign:
    """Let PEFT merge the adapters of a comparison in each of its ways, and evaluate what it saves.

    Rows that an earlier attempt finished are read from `folder`, where new ones are kept. Empty for whole models.
    """
    group, found = group_of(session.inputs.ingredients), Foreign()
    if group is None:
        return found
    refused: dict[str, list[str]] = {}
    for number, name in enumerate(PEFT_MERGES):
        session.progress("merging with PEFT", number, len(PEFT_MERGES))
        try:
            found.results[name] = _result(session, output, group, name, folder / name.replace(":", "_"))
        except NoMergeError as error:
            refused.setdefault(str(error), []).append(name)
    found.notes = [f"{', '.join(names)}: no row, because {why}." for why, names in refused.items()]
    return found


def _result(session: Session, output: Output, group: AdapterSet, name: str, file: Path) -> SoupResult:
    """Return the result of one row; make it unless the files named `file` exist. Raises NoMergeError."""
    outcomes, made_so = file.with_name(f"{file.name}.npz"), file.with_name(f"{file.name}.json")
    if not made_so.exists():
        start, folder = time.monotonic(), file.with_name(f"{file.name}_adapter")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            adapter = open_adapter(str(merge_with_peft(session.recipe.model, group, name.partition(":")[2], folder)))
            seconds = round(time.monotonic() - start, 3)
            _check(session, adapter)
            splits = {source: session.whole(source) for source in session.setup.sizes}
            path = output.visible_to_actors(Path(adapter.files[0]))
            measured = session.pool.evaluate_file(path, list(splits.values()), session.progress)
            save_outcomes(dict(zip(splits, measured, strict=True)), outcomes)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        write_entry({"figures": {"seconds": seconds, "ingredients_used": len(group.adapters)}, "notes": []}, made_so)
    return SoupResult(load_outcomes(outcomes), read_entry(made_so)["figures"])


def _check(session: Session, adapter: AdapterIngredient) -> None:
    """Check that PEFT loads what it has saved. Raises NoMergeError."""
    try:
        check_with_peft(session.recipe.model, [adapter])
    except IngredientError as error:
        raise NoMergeError(f"PEFT cannot load what it saves ({str(error)[:300]})") from error
