"""Every soup of many zoos: what a variant of mehl+ gains or loses, and what nothing but training would give.

    python -m tests.benchmarks zoos                          # all zoos, one seed
    python -m tests.benchmarks zoos --seeds 3 --write        # three seeds; write docs/zoos.md
    python -m tests.benchmarks zoos --only digits-6,shift-12 --out FOLDER
    python -m tests.benchmarks zoos --variants average+refit # only these variants of mehl+
    python -m tests.benchmarks zoos --no-compare --write FILE --variants 'default+no rows+rows at once'

For every zoo and seed, this makes the rows of `ray-soup compare` and, for each entry of VARIANTS, a soup by mehl+ with other
keys of the recipe. Zoos, and finished results in results.jsonl, are kept in FOLDER, so that the same command resumes after
an interruption; with --record, results are kept in zoos.jsonl beside this file instead, so that any machine resumes. Results
are reused as long as neither the code of ray_soup nor that of the zoo changes; with --any-version, those of other versions
of ray_soup are, too. With --kept, nothing is made, and the tables show what is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tests.benchmarks import zoos_images, zoos_texts
from tests.benchmarks.zoos_kept import Kept, Rows, digest_of
from tests.benchmarks.zoos_tables import (
    ACCURACY,
    PASSES,
    PLAIN,
    SCALED,
    Results,
    differences_table,
    figures_of,
    main_table,
    rows_in,
    worse_than_plain,
)

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "zoos.md"
RECORD = Path(__file__).parent / "zoos.jsonl"
ZOOS: dict[str, Callable[[Path, int], zoos_images.Recipe]] = {
    "digits-6": zoos_images.digits_small,
    "digits-24": zoos_images.digits_large,
    "mnist-8": zoos_images.mnist_transformers,
    "mnist-72": zoos_images.mnist_perceptrons,
    "efficientnet-6": zoos_images.efficientnet,
    "texts-12": zoos_texts.classifier,
    "language-10": zoos_texts.language,
    "adapters-8": zoos_texts.adapters,
    "shift-12": zoos_images.shifted,
    "broken-11": zoos_images.broken,
}
"""Every zoo by its name, which ends with the number of ingredients. A function writes the files and returns the recipe."""

APART = ("broken-11",)
"""Zoos that means over zoos leave out: a diverged ingredient makes differences a hundred times as large as elsewhere."""


OF_IMAGES = ("tiny.py", *(f"benchmarks/{name}.py" for name in ("batchnorm", "zoos_images", "zoos_models")))
"""The files that say what the zoos of images are."""
MADE_BY = {
    module.__name__: digest_of(ROOT / "tests" / path for path in files)
    for module, files in ((zoos_images, OF_IMAGES), (zoos_texts, (*OF_IMAGES, "benchmarks/zoos_texts.py")))
}
"""A digest of the code that makes a zoo, as it was imported, by the module of the zoo's function."""

OFF: dict[str, Any] = {
    "learn.lr": 0.01, "learn.cosine_lr": True, "learn.average": False, "learn.whiten": 0.0, "learn.screen": False,
    "blocks": "tensor",
}  # fmt: skip
"""Keys that make mehl+ what it was by default in version 0.1; a key that this version does not know is off anyway."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": OFF,
    "default": {},
    "no screen": {"learn.screen": False},
    "no whiten": {"learn.whiten": 0.0},
    "full whiten": {"learn.whiten": 1.0},
    "no rows": {"blocks": "tensor"},
    "rows at once": {"blocks": {"tensor": 4}},
    "no average": {"learn.average": False},
    "fixed rate": {"learn.lr": 0.01, "learn.cosine_lr": True},
    "2 epochs": {"learn.epochs": 2},
    "int4": {"directions.dtype": "int4"},
    "refit": {"learn.refit": True},
    "polish": {"polish": {"epochs": 5, "lr": 3e-4}},
}
"""Keys of the recipe that differ from the defaults, by the name of the variant; its row is called `mehl+ NAME`."""
COMPARE = "compare"
"""Name under which the rows of `compare` are kept."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    out: Path
    results: Path
    seeds: tuple[int, ...] = (1,)
    zoos: tuple[str, ...] = tuple(ZOOS)
    variants: tuple[str, ...] = tuple(VARIANTS)
    write: Path | None = None
    compare: bool = True
    any_version: bool = False
    kept: bool = False


def options_in(arguments: list[str]) -> Options:
    """Read the options of the command line."""
    from ray_soup.io.cache import cache_folder

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks zoos", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="seeds 1 to N; each draws its own zoos (default: 1)"
    )
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(ZOOS)} (default: all)")
    parser.add_argument("--variants", default="", metavar="NAME+...", help="variants of mehl+ to try, as in 'refit+rows'")
    parser.add_argument("--out", type=Path, help="folder of zoos and results (default: in the cache of ray_soup)")
    parser.add_argument("--no-compare", action="store_true", help="leave out the rows of `ray-soup compare`")
    parser.add_argument("--write", nargs="?", type=Path, const=DOCS, metavar="FILE", help="write docs/zoos.md, or FILE")
    parser.add_argument("--record", action="store_true", help="keep results in tests/benchmarks/zoos.jsonl, not in --out")
    parser.add_argument("--any-version", action="store_true", help="take results of other versions of ray_soup, too")
    parser.add_argument("--kept", action="store_true", help="make nothing: tables of the results that are kept")
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error(f"--seeds is {given.seeds}; expected 1 or more")
    zoos = chosen(given.only.split(","), ZOOS, parser, "--only")
    variants = chosen(given.variants.split("+"), VARIANTS, parser, "--variants")
    if "plain" not in variants:
        variants = ("plain", *variants)  # what the others are compared with
    out = (given.out or cache_folder() / "zoos").absolute()
    seeds = tuple(range(1, given.seeds + 1))
    results = RECORD if given.record else out / "results.jsonl"
    return Options(out, results, seeds, zoos, variants, given.write, not given.no_compare, given.any_version, given.kept)


def chosen(names: Iterable[str], known: Iterable[str], parser: argparse.ArgumentParser, option: str) -> tuple[str, ...]:
    """Return the known names that an option lists; all of them if it lists none."""
    asked = [name.strip() for name in names if name.strip()]
    unknown = [name for name in asked if name not in list(known)]
    if unknown:
        parser.error(f"{option}: found {', '.join(unknown)}; expected some of {', '.join(known)}")
    return tuple(name for name in known if name in asked) if asked else tuple(known)


def made_by(zoo: str) -> str:
    """Return the digest of the code that makes a zoo."""
    return MADE_BY.get(ZOOS[zoo].__module__, "")


def zoo_in(options: Options, name: str, seed: int) -> zoos_images.Recipe:
    """Return the recipe of a zoo; make the zoo unless an earlier call of the same code finished it."""
    import torch

    folder = options.out / "zoos" / f"{name}-seed{seed}"
    file, digest = folder / "made.json", made_by(name)
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        if made["digest"] == digest and made["folder"] == str(folder):
            recipe: zoos_images.Recipe = made["recipe"]
            return recipe
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begun, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # the same zoo on any number of cores
    try:
        recipe = ZOOS[name](folder, seed)
    finally:
        torch.set_num_threads(threads)
    said = json.dumps({"digest": digest, "folder": str(folder), "recipe": recipe}, indent=1)
    file.with_suffix(".partial").write_text(said, encoding="utf-8")
    file.with_suffix(".partial").replace(file)
    print(f"{name}, seed {seed}: made in {time.monotonic() - begun:.0f} s", flush=True)
    return recipe


def known_keys(changes: dict[str, Any]) -> dict[str, Any]:
    """Select the keys that a recipe of this version has."""
    from ray_soup.recipe import Recipe

    def known(key: str) -> bool:
        kind: Any = Recipe
        for part in key.split("."):
            kind = getattr(kind, "model_fields", {}).get(part)
            if kind is None:
                return False
            kind = kind.annotation
        return True

    return {key: value for key, value in changes.items() if known(key)}


def fault_of(variant: str) -> str | None:
    """Say why this version of ray_soup cannot make a variant, if it cannot."""
    from ray_soup.errors import RecipeError
    from ray_soup.recipe import make_recipe, with_changes

    changes = VARIANTS[variant]
    unknown = [key for key in changes if key not in known_keys(changes)]
    if unknown:
        return f"this version of ray_soup has no key {', '.join(unknown)}"
    try:
        with_changes(make_recipe({"method": "mehl+", "model": "tests.tiny:build"}), changes)
    except RecipeError as error:
        return f"this version of ray_soup refuses it. {' '.join(str(error).split())}"
    return None


def rows_of(name: str, soup: Any, seed: int) -> Rows:
    """Return the figures on test by row, for `compare` the whole table and otherwise one row."""
    if name == COMPARE:
        return {common_name(row["model_name"]): figures_in(row) for row in soup.record["table"]}
    row = next(row for row in soup.rows if row["model_name"] != "best_single")
    figures = figures_in({**soup.record, **row})
    figures |= {
        f"curve_{n}": line["select_nll"] for n, line in enumerate(soup.record.get("curve", [])) if "select_nll" in line
    }
    return {f"mehl+ {name}": figures}


def common_name(label: str) -> str:
    """Return the name of a row without the number of ingredients in a model batch, which is a quarter of the zoo's."""
    return re.sub(r"-m\d+$", ", in quarters", label)


def figures_in(row: dict[str, Any]) -> dict[str, float]:
    """Select the figures on test and the costs of a row of results."""
    keys = {"nll": "test_nll", "scaled": "test_nll_scaled", "accuracy": "test_accuracy", "steps": "steps"}
    keys["images"] = "image_passes"
    return {key: float(row[name]) for key, name in keys.items() if row.get(name) is not None}


def run_all(options: Options) -> Iterator[tuple[str, int, Rows]]:
    """Yield the rows of every zoo, seed and variant; make those that are not kept from an earlier call."""
    from ray_soup.actors.ray_session import connect

    options.out.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.results, options.any_version)
    variants = []
    for variant in options.variants:
        fault = fault_of(variant)
        if fault:
            print(f"mehl+ {variant}: skipped, {fault}", flush=True)
        else:
            variants.append(variant)
    with connect():
        for zoo in options.zoos:
            for seed in options.seeds:
                recipe = zoo_in(options, zoo, seed)
                for name in (COMPARE, *variants) if options.compare else variants:
                    rows = one_run(options, kept, zoo, seed, name, recipe)
                    if rows is not None:
                        yield zoo, seed, rows


def one_run(options: Options, kept: Kept, zoo: str, seed: int, name: str, recipe: zoos_images.Recipe) -> Rows | None:
    """Return the rows of `compare` or of a variant on a zoo; None if this version refuses the variant there."""
    import ray_soup
    from ray_soup.errors import RecipeError

    changes = {} if name == COMPARE else VARIANTS[name]
    text = json.dumps([recipe, changes], sort_keys=True).replace(str(options.out), "")  # the same key in any folder
    key = (zoo, seed, name, digest_of((), made_by(zoo), text))
    changes = {**known_keys(changes), "learn.seed": seed}
    if options.kept and key not in kept.found:
        return None
    if key not in kept.found:
        out = options.out / "runs" / f"{zoo}-seed{seed}-{digest_of((), kept.code, *map(str, key))}"
        begun = time.monotonic()
        try:
            if name == COMPARE:
                soup = ray_soup.compare(recipe, out, **changes)
            else:
                soup = ray_soup.learn(recipe, out, "mehl+", **changes)
        except RecipeError as error:
            if name == COMPARE:
                raise
            print(f"{zoo}, seed {seed}, mehl+ {name}: refused. {' '.join(str(error).split())}", flush=True)
            return None
        kept.add(key, rows_of(name, soup, seed), time.monotonic() - begun)
        shutil.rmtree(out)
        shown = ", ".join(
            f"{row} {figures['nll']:.4f}" for row, figures in kept.found[key].items() if len(kept.found[key]) == 1
        )
        print(f"{zoo}, seed {seed}: {shown or name} in {time.monotonic() - begun:.0f} s", flush=True)
    return kept.found[key]


def gathered(found: Iterable[tuple[str, int, Rows]]) -> Results:
    """Sort rows by zoo and seed, and add PASSES to those of the variants."""
    results: dict[str, dict[int, Rows]] = {}
    for zoo, seed, rows in found:
        results.setdefault(zoo, {}).setdefault(seed, {}).update({row: dict(figures) for row, figures in rows.items()})
    for seeds in results.values():
        for rows in seeds.values():
            goal = min(curve_in(rows.get(PLAIN, {})), default=-math.inf)
            needed = {row: passes_to(goal, curve) for row, figures in rows.items() if (curve := curve_in(figures))}
            if needed.get(PLAIN):  # not if its best point is the start
                for row, passes in needed.items():
                    rows[row][PASSES] = passes / needed[PLAIN]
    return results


def passes_to(goal: float, curve: Iterable[float]) -> float:
    """Return the passes over fit until the NLL on select is at most `goal`; inf if it never is."""
    return next((float(passes) for passes, nll in enumerate(curve) if nll <= goal), math.inf)


def curve_in(figures: dict[str, float]) -> list[float]:
    """Return the NLL on select at the start and after each pass over fit."""
    return [value for key, value in figures.items() if key.startswith("curve_")]


def markdown(results: Results, options: Options) -> str:
    """Return the page that is written."""
    seeds = len(options.seeds)
    given = {
        "--any-version": options.any_version,
        "--kept": options.kept,
        "--record": options.results == RECORD,
        "--write": True,
    }
    asked = " ".join([f"--seeds {seeds}", *(option for option, on in given.items() if on)])
    if not options.compare:
        asked = f"--only {','.join(options.zoos)} --variants '{'+'.join(options.variants)}' --no-compare {asked}"
    mixed = " Some results may be those of earlier versions of ray_soup." if options.any_version else ""
    over = {zoo: found for zoo, found in results.items() if zoo not in APART} or results
    apart = "".join(f" Without `{zoo}`, which has a table of its own below." for zoo in results if zoo not in over)
    rows = {zoo: ZOOS[zoo].__doc__ or "" for zoo in results}
    zoos = "\n".join(f"- `{zoo}`: {text.splitlines()[0]}" for zoo, text in rows.items())
    worse = [f"`{row}` on {', '.join(zoos)}" for row, zoos in worse_than_plain(results).items() if row.startswith("mehl+ ")]
    keys = {f"mehl+ {name}": changes for name, changes in VARIANTS.items() if changes}
    shown = {row for seeds_of in results.values() for by_row in seeds_of.values() for row in by_row}
    variants = "\n".join(f"- `{row}`: `{json.dumps(changes)}`" for row, changes in keys.items() if row in shown)
    several = (
        "Means are over zoos, of means over seeds, and errors over zoos." if len(over) > 1 else "Errors are over seeds."
    )
    text = f"""# Soups of {len(results)} zoo{"s" if len(results) > 1 else ""}

{zoos}

Every zoo is made of real data, with {seeds} seed{"s" if seeds > 1 else ""}; each seed draws its own splits, trunk and
ingredients. All figures are those of the written models on test. A difference is paired: of the same zoo and seed. In
brackets: its standard error. {several}{mixed}
A negative difference in NLL is an improvement. `NLL scaled`: after temperature scaling fitted on select. `passes to plain`:
the passes over fit until the NLL on select was as low as the best of `{PLAIN}`, divided by those that it needed itself
(median). `in quarters`: with a model batch of a quarter of the ingredients.

`{PLAIN}` is mehl+ with the defaults of version 0.1, `mehl+ default` with those of this one. The other variants differ from
them in these keys:

{variants or "none that this version knows"}

## All zoos

Of {len(over)} zoo{"s" if len(over) > 1 else ""}.{apart}

{main_table(over)}

Of the variants, an NLL above that of `{PLAIN}` by more than the standard error over the seeds: {"; ".join(worse) or "none"}.

{differences_table(over, SCALED)}

{differences_table(over, ACCURACY)}
"""
    for zoo, by_seed in results.items() if len(results) > 1 else ():
        text += f"\n## {zoo}\n\n{main_table({zoo: by_seed})}\n"
    return f"{text}\nMade with `python -m tests.benchmarks zoos {asked}`.\n"


def summary(results: Results) -> Iterator[tuple[str, str, float]]:
    """Yield the mean NLL over zoos of each row that all zoos have."""
    for row in rows_in(results):
        values = figures_of(results, row, "nll")
        if len(values) == len(results):
            yield row, "mean test NLL", mean(values)


def main() -> dict[str, float]:
    """Run what the options after the benchmark's name ask for; print the tables, and write them with --write."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of every tiny model that is written or loaded
    options = options_in(sys.argv[sys.argv.index("zoos") + 1 :])
    try:
        results = gathered(run_all(options))
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted. Finished results are in {options.results}; rerun the same command to resume.\n")
        sys.exit(130)
    text = markdown(results, options)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    return {f"{row}, {key}": value for row, key, value in summary(results)}
