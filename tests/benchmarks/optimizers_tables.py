"""What the benchmark `optimizers` makes of its runs: passes, gains on select, differences on test, and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from statistics import mean, median

from tests.benchmarks.optimizers_tried import ORDER, TRIED
from tests.benchmarks.zoos_kept import Rows
from tests.benchmarks.zoos_tables import NLL, error_of, table, with_error

Name = tuple[str, float]
"""An optimizer and its scale."""
DEFAULT: Name = ("default", 1.0)
NAMES: tuple[Name, ...] = (
    DEFAULT,
    *((ORDER, number) for number in (1.0, 2.0, 3.0)),
    *((name, scale) for name, (_, scales) in TRIED.items() for scale in scales),
)
Pairs = dict[tuple[int, int], dict[Name, Rows]]
"""Figures by seed and cut, and optimizer: `test` and, for each turn, the NLL on select by steps."""


def curves(rows: Rows) -> list[dict[int, float]]:
    """Return the NLL on select by steps, ascending, of each turn."""
    turns = sorted((int(turn), found) for turn, found in rows.items() if turn != "test")
    return [{int(step): found[step] for step in sorted(found, key=int)} for _, found in turns]


def best(rows: Rows) -> float:
    """Return the lowest NLL on select."""
    return min(nll for turn in curves(rows) for nll in turn.values())


def passes(rows: Rows, default: Rows) -> float:
    """Return the passes over fit until select is as good as the default's best; inf if it never is.

    A turn with groups of rows follows one with whole tensors. Each counts up to where it is as good as the default at the
    turn's end, or whole.
    """
    steps, goal, lowest, begun = 0, math.inf, math.inf, 0
    for found, its in zip_longest(curves(rows), curves(default), fillvalue={}):
        mine = found or {begun: math.inf}  # of a run that failed
        goal = min(goal, *its.values())
        if lowest > goal:
            steps += next((step for step, nll in mine.items() if nll <= goal), max(mine)) - begun
        lowest, begun = min(lowest, *mine.values()), max(mine)
    return steps / rows["test"]["per_pass"] if lowest <= goal else math.inf


def common_steps(one: Rows, other: Rows) -> tuple[int, int]:
    """Return the steps of two runs until select is as low as the higher of their two lowest figures."""
    goal = max(best(one), best(other))
    first, second = (min(s for turn in curves(rows) for s, nll in turn.items() if nll <= goal) for rows in (one, other))
    return first, second


@dataclass(frozen=True)
class Figures:
    """What an optimizer did on a zoo, beside the default; one figure per seed and cut."""

    ratios: list[float]
    """Passes, divided by the default's; without pairs in which the default's best is its start."""
    common: list[float]
    """Steps to a common goal, divided by the default's."""
    gain: float
    """How far select fell, divided by how far it fell with the default."""
    tests: list[float]
    """NLL on test minus the default's."""

    @property
    def ratio(self) -> float:
        return median(self.ratios) if self.ratios else math.nan


def figures_of(pairs: Pairs, name: Name) -> Figures:
    """Compare an optimizer with the default on a zoo."""
    both = [(rows[name], rows[DEFAULT]) for rows in pairs.values()]
    needed = [(passes(mine, its), passes(its, its)) for mine, its in both]
    fell, its_fell = (sum(curves(rows)[0][0] - best(rows) for rows in some) for some in zip(*both, strict=True))
    steps = [common_steps(mine, its) for mine, its in both]
    return Figures(
        [mine / its for mine, its in needed if its],
        [mine / its if its else math.inf for mine, its in steps if mine or its],
        fell / its_fell if its_fell else math.nan,
        [mine["test"]["nll"] - its["test"]["nll"] for mine, its in both],
    )


def chosen_scales(found: dict[Name, dict[str, Figures]]) -> list[Name]:
    """Return each optimizer with the scale whose mean gain over the zoos is the largest; the default first."""
    of_each = {name: [n for n in found if n[0] == name] for name, _ in found}
    return [max(names, key=lambda n: mean(figures.gain for figures in found[n].values())) for names in of_each.values()]


def wins(by_zoo: dict[str, Figures]) -> bool:
    """Return whether an optimizer is faster on seven eighths of the zoos, and on test not worse by more than the error."""
    tests = [mean(figures.tests) for figures in by_zoo.values()]
    return faster_on(by_zoo) >= 7 / 8 * len(by_zoo) and mean(tests) <= error_of(tests)


def faster_on(by_zoo: dict[str, Figures]) -> int:
    """Return the number of zoos on which an optimizer is faster."""
    return sum(figures.ratio < 1 for figures in by_zoo.values())


def ratio_text(value: float) -> str:
    return "never" if math.isinf(value) else "" if math.isnan(value) else f"{value:.2f}"


def faster_and_slower(lists: Iterable[list[float]]) -> str:
    ratios = [ratio for some in lists for ratio in some]
    return f"{sum(r < 1 for r in ratios)}/{sum(r > 1 for r in ratios)}"


def markdown(results: Mapping[str, Pairs], command: str) -> str:
    """Return the page that is written."""
    found = {name: {zoo: figures_of(pairs, name) for zoo, pairs in results.items()} for name in NAMES}
    names, every = chosen_scales(found), list(results)
    others = [name for name in names if name != DEFAULT]
    tried = [name for name in others if name[0] != ORDER]
    winners = [f"`{name}`" for name, scale in tried if wins(found[name, scale])]
    nearest = max(tried, key=lambda name: faster_on(found[name]))

    def row(name: Name) -> str:
        return f"{name[0]}, {name[1]:g}" if name != DEFAULT else name[0]

    speed = table(["optimizer, scale", "zoos faster", "pairs faster/slower", *every], (
        [row(n), f"{faster_on(found[n])}/{len(every)}", faster_and_slower(f.ratios for f in found[n].values()),
         *(ratio_text(found[n][zoo].ratio) for zoo in every)] for n in others
    ))  # fmt: skip
    common = table(["optimizer, scale", "zoos faster", "pairs faster/slower", *every], (
        [row(n), f"{sum(median(f.common or [math.nan]) < 1 for f in found[n].values())}/{len(every)}",
         faster_and_slower(f.common for f in found[n].values()),
         *(ratio_text(median(found[n][zoo].common or [math.nan])) for zoo in every)] for n in NAMES if n != DEFAULT
    ))  # fmt: skip
    gain = table(["optimizer, scale", "mean", *every], (
        [row(n), f"{mean(f.gain for f in found[n].values()):.2f}", *(f"{found[n][zoo].gain:.2f}" for zoo in every)]
        for n in NAMES if n != DEFAULT
    ))  # fmt: skip
    test = table(["optimizer, scale", "mean", "zoos better/worse", *every], (
        [row(n), with_error([mean(f.tests) for f in found[n].values()], NLL),
         f"{sum(mean(f.tests) < 0 for f in found[n].values())}/{sum(mean(f.tests) > 0 for f in found[n].values())}",
         *(with_error(found[n][zoo].tests, NLL) for zoo in every)] for n in others
    ))  # fmt: skip
    pairs = ", ".join(f"`{zoo}` {len(some)}" for zoo, some in results.items())
    its = [passes(rows[DEFAULT], rows[DEFAULT]) for some in results.values() for rows in some.values()]
    verdict = f"By this measure, {' and '.join(winners)} won."
    if not winners:
        chance, first = (faster_on(found[name]) for name in (next(n for n in others if n[0] == ORDER), nearest))
        verdict = (
            f"None met this, so the default stays. The nearest is `{nearest[0]}`, faster on {first} of {len(every)} zoos; "
            f"by chance alone, `{ORDER}` was faster on {chance}."
        )
    return PAGE.format(
        verdict=verdict, pairs=pairs, order=ORDER, passes=f"{median(its):.1f}", speed=speed, common=common, gain=gain,
        test=test, tried="\n".join(f"- `{name}`: {text}" for name, text in ABOUT.items()), command=command,
    )  # fmt: skip


ABOUT = {
    ORDER: "the default with three other orders of its batches. Its differences from the default are chance.",
    "larger rate": "AdamW, with two and four times the rate, and the mean of the iterates.",
    "schedule-free": "schedule-free AdamW (Defazio et al. 2024), with its own average of the iterates.",
    "Prodigy": "Adam whose rate is an estimate of the distance to the best point (Mishchenko and Defazio 2024). The scale "
    "is that of the first estimate; with 0 it is 1e-6, the usual one.",
    "Shampoo": "the mean gradient between the inverse fourth roots of the sums of G G^T, over ingredients, and of G^T G, "
    "over blocks (Gupta et al. 2018), or only the inverse square root of the former with more than 512 blocks. Steps are "
    "as long as Adam's.",
    "natural step": "the mean gradient times the inverse of the empirical Fisher matrix of the last 32 batches, which "
    "stands for the matrix of Gauss-Newton, damped by its mean eigenvalue. Steps are as long as Adam's.",
    "Nesterov": "SGD with Nesterov's momentum of 0.9. The scale is the length of its first step, in units of Adam's.",
}
"""What is tried, by name."""

PAGE = """# Other optimizers

By default, mehl+ moves its coordinates with AdamW at the rate of `learn.lr: auto`, and takes the mean of the iterates of
each epoch (`learn.average`). This page asks whether another optimizer needs fewer passes over fit. It would replace the
default if it were faster on at least seven eighths of the zoos and, in the mean over zoos, its NLL on test were above that
of the default by no more than the standard error. {verdict}

Everything but the optimizer is as by default: five epochs for each turn, whitened coordinates in units of how far apart the
ingredients are, and the same start.

{tried}

Unless stated otherwise, the scale multiplies the rate of the default, and the point is the mean of the iterates of an epoch.
Each optimizer was tried with two or three scales. The tables of passes and of test show the scale whose mean on select is
the best over all zoos together. This choice favors the optimizers over the default, which has one scale; `{order}` is chosen
in the same way, and shows by how much.

The zoos are those of [zoos.md](zoos.md). A pair is a run of an optimizer and one of the default on the same zoo and the same
cut of the held-out data into fit and select. Pairs: {pairs}. Select was evaluated at the end of each epoch and, if an epoch
has several steps, about four times within it; models are chosen at the ends of epochs only. Select is small, a fifth of the
held-out data, so that its lowest figure is partly luck. The table of test shows what is left of it.

## Passes

Passes over fit until the NLL on select was as low as the default's lowest, divided by those that the default itself needed
(median: {passes}). Below 1 is faster. Each figure is a median over pairs. Where groups of rows are learned after whole
tensors, each of the two turns counts up to where it was as good as the best of the default up to the end of that turn.

{speed}

## Passes to a common goal

The table above favors the default: it reaches its own lowest figure by definition, and another run that is no better or
worse does so in about half of the pairs. Here, both runs of a pair count up to the higher of their two lowest figures, over
all turns; a pair whose goal is the start is left out. Where they end is not measured: an optimizer that stops early sets an
easy goal. All scales are shown; those of `{order}` show what is chance. This measure was added after the first results had
been seen.

{common}

## Select

How far the NLL on select fell from the start to its lowest, divided by how far it fell with the default in as many steps.
Above 1 is better. All scales are shown.

{gain}

## Test

NLL on test of the soup that was chosen on select, minus that of the default. Below 0 is better. In brackets: the standard
error over pairs; that of the mean is over zoos.

{test}

Made with `python -m tests.benchmarks optimizers {command}`.
"""
