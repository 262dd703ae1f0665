"""Other optimizers of mehl+: how many passes over fit they need to the select NLL of the default, and what test says.

    python -m tests.benchmarks optimizers                       # six zoos, one seed
    python -m tests.benchmarks optimizers --seeds 2 --cuts 3 --write   # three cuts of the held-out data each; write the page
    python -m tests.benchmarks optimizers --only mnist-8,texts-12
    python -m tests.benchmarks optimizers --seeds 2 --cuts 9 --kept    # make nothing: all that is kept

Zoos are those of the benchmark `zoos`, and are kept in the same FOLDER. Finished results are kept in
FOLDER/optimizers.jsonl, so that the same command resumes after an interruption, as long as neither the code of ray_soup nor
the optimizers change.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh
from ray_soup.errors import SoupError
from ray_soup.io.cache import cache_folder
from ray_soup.io.progress import no_progress
from ray_soup.recipe import DEFAULT_METHOD, Learn, for_method, make_recipe
from ray_soup.soups import learn as learning
from ray_soup.soups.inputs import CALIBRATION_WHILE_CHOOSING, open_inputs
from ray_soup.soups.methods.learned import learn_in
from ray_soup.soups.model_batch import requested_model_batch
from ray_soup.soups.optimize import make_optimizer, parametrization
from ray_soup.soups.session import Session
from ray_soup.soups.state import LearnState, ignore_state
from tests.benchmarks import zoos
from tests.benchmarks.optimizers_tables import NAMES, Name, Pairs, figures_of, markdown
from tests.benchmarks.optimizers_tried import ORDER, TRIED, Projected
from tests.benchmarks.zoos_kept import Kept, Rows, digest_of

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "optimizers.md"
USUAL = ("digits-6", "digits-24", "mnist-72", "adapters-8", "shift-12", "language-10")
EVALUATIONS = 4
"""How often select is evaluated in an epoch, if it has that many steps."""
Results = dict[str, Pairs]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    zoos: zoos.Options
    cuts: int
    kept: bool
    write: Path | None


def options_in(arguments: list[str]) -> Options:
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks optimizers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="seeds 1 to N; each draws its own zoos (default: 1)"
    )
    parser.add_argument("--cuts", type=int, default=1, metavar="N", help="cuts into fit and select of each zoo (default: 1)")
    parser.add_argument("--only", default=",".join(USUAL), metavar="NAME,...", help=f"of {', '.join(zoos.ZOOS)}")
    parser.add_argument("--kept", action="store_true", help="make nothing: tables of the results that are kept")
    parser.add_argument(
        "--out", type=Path, default=cache_folder() / "zoos", metavar="FOLDER", help="folder of zoos and results"
    )
    parser.add_argument(
        "--write", nargs="?", type=Path, const=DOCS, metavar="FILE", help="write docs/optimizers.md, or FILE"
    )
    given = parser.parse_args(arguments)
    for name in ("seeds", "cuts"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}; expected 1 or more")
    chosen = zoos.chosen(given.only.split(","), zoos.ZOOS, parser, "--only")
    out = given.out.absolute()
    seeds = tuple(range(1, given.seeds + 1))
    return Options(zoos.Options(out, out / "optimizers.jsonl", seeds, chosen), given.cuts, given.kept, given.write)


class _Watched(learning._Learning):
    """Learning that also evaluates select within epochs, and knows where a schedule-free optimizer is."""

    seen: ClassVar[Rows]
    last: ClassVar[LearnState]
    moved_by: torch.optim.Optimizer

    def begin_turn(self, turn: int) -> tuple[np.ndarray, torch.optim.Optimizer]:
        _Watched.last = self.state
        chosen, self.moved_by = super().begin_turn(turn)
        return chosen, self.moved_by

    def point(self) -> tuple[torch.Tensor, float]:
        point, factor = super().point()
        assert self.state.moving is not None
        return self.moved_by.state[self.state.moving].get("average", point), factor

    def move(self, optimizer: torch.optim.Optimizer, partials: list[Any], step: int) -> None:
        super().move(optimizer, partials, step)
        state, done = self.state, self.state.step + 1
        if done % max(1, self.steps_per_epoch // EVALUATIONS) or done == self.steps_per_epoch or self.calibration:
            return  # the epoch's end is evaluated anyway, and running statistics would have to be re-estimated
        state.step = done
        point, factor = self.point()
        state.step = done - 1
        self.seen.setdefault(f"{state.turn}", {})[f"{state.steps + 1}"] = self.pool.evaluate(
            self._sent(point), factor, self.select
        ).nll


def maker_of(name: Name) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes an optimizer in place of `make_optimizer`."""
    if name[0] not in TRIED:
        return make_optimizer

    def make(learn: Learn, largest: float, *parameters: torch.Tensor) -> torch.optim.Optimizer:
        return Projected(TRIED[name[0]][0], name[1], largest, *parameters)

    return make


def session_of(recipe: dict[str, Any], seed: int) -> Session:
    """Set a zoo up in this process, as `zoos` does on Ray, with one thread."""
    made = make_recipe({**recipe, "method": DEFAULT_METHOD, "learn": {"seed": seed}})
    inputs, mesh = open_inputs(made, needs_fit=True), Mesh(1, 1)
    pool, count = InProcessPool(made, inputs.ingredients, mesh, 1), requested_model_batch(made, len(inputs.ingredients))
    session = Session(made, inputs, pool, pool.setup(no_progress), mesh, 1, count, subset=inputs.everything)
    return session.with_soup(splits=session.cut(seed))


def one_run(session: Session, name: Name) -> Rows:
    """Learn a soup with an optimizer; return its NLL on test, and those on select by turn and step."""
    _Watched.seen = {}
    if name[0] == ORDER:
        recipe = for_method(session.recipe, DEFAULT_METHOD, seed=session.recipe.learn.seed + int(name[1]))
        session = session.with_soup(recipe=recipe)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(learning, "make_optimizer", maker_of(name)),
        patch.object(learning, "_Learning", _Watched),
    ):
        try:
            store, _, state = learn_in(session.with_soup(state_file=Path(folder) / "learn.pt"), ignore_state, ignore_state)
        except SoupError as error:  # its loss was not finite: it counts as a run that stayed where it began
            print(f"{name[0]} {name[1]:g}: {error}", flush=True)
            store, state, _Watched.seen = session.open_store(session.subset, session.blocks), _Watched.last, {}
            state.y, state.curve = torch.zeros_like(state.y) if state.start is None else state.start, state.curve[:1]
    x = parametrization(False, store.norms).x(state.y.numpy()).astype(np.float32)
    session.pool.begin(np.arange(len(x)), x, state.precision)
    calibration = session.calibration(CALIBRATION_WHILE_CHOOSING)
    if calibration:
        session.pool.recalibrate(x, calibration)
    found = _Watched.seen
    for line in state.curve:
        found.setdefault(f"{int(line['turn'])}", {})[f"{int(line['steps'])}"] = line["select_nll"]
    per_pass = -(-len(session.splits["fit"]) // session.recipe.learn.batch_size)
    return {**found, "test": {"nll": session.pool.evaluate(x, 1.0, session.splits["test"]).nll, "per_pass": per_pass}}


def run_all(options: Options) -> Results:
    """Return the results of every zoo, seed, cut and optimizer; make those that are not kept from an earlier call."""
    options.zoos.out.mkdir(parents=True, exist_ok=True)
    kept, results = Kept(options.zoos.results), Results()
    code = digest_of([Path(__file__).with_name("optimizers_tried.py")])
    for zoo in options.zoos.zoos:
        for seed in options.zoos.seeds:
            for cut in range(options.cuts):
                keys = {name: (zoo, seed, f"{name[0]} {name[1]:g} cut {cut}", zoos.made_by(zoo) + code) for name in NAMES}
                missing, begun = [name for name, key in keys.items() if key not in kept.found], time.monotonic()
                if missing and options.kept:
                    continue
                if missing:
                    session = session_of(zoos.zoo_in(options.zoos, zoo, seed), seed + 1000 * cut)
                    for name in missing:
                        kept.add(keys[name], one_run(session, name), time.monotonic() - begun)
                    session.pool.close()
                    print(f"{zoo}, seed {seed}, cut {cut}: {time.monotonic() - begun:.0f} s", flush=True)
                results.setdefault(zoo, {})[seed, cut] = {name: kept.found[key] for name, key in keys.items()}
    return results


def command_of(options: Options) -> str:
    """Return the options that make the same page."""
    of_zoos = options.zoos
    only = "" if set(of_zoos.zoos) == set(USUAL) else f" --only {','.join(of_zoos.zoos)}"
    return f"--seeds {len(of_zoos.seeds)} --cuts {options.cuts}{' --kept' if options.kept else ''}{only} --write"


def main() -> dict[str, float]:
    """Run what the options after the benchmark's name ask for; print the page, and write it with --write."""
    options = options_in(sys.argv[sys.argv.index("optimizers") + 1 :])
    results = run_all(options)
    if not results:
        sys.exit(f"{options.zoos.results}: found no complete results of these zoos. Leave out --kept to make them.")
    text = markdown(results, command_of(options))
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    found = {name: {zoo: figures_of(pairs, name) for zoo, pairs in results.items()} for name in NAMES}
    return {
        f"{name} {scale:g}, select gain over the default's": mean(f.gain for f in by_zoo.values())
        for (name, scale), by_zoo in found.items()
    }
