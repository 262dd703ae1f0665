"""Run benchmarks by name, all without one: a table, then a line of JSON."""

import json
import sys

from tests.benchmarks import chaos, greedy, ingredients, limits, quality, scaling, step

BENCHMARKS = {
    "ingredients": ingredients.main,
    "greedy": greedy.main,
    "step": step.main,
    "limits": limits.main,
    "chaos": chaos.main,
}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    results = {}
    for name in names:
        results[name] = BENCHMARKS[name]()
        for key, value in results[name].items():
            print(f"{name:<14} {key:<44} {value:>12,.3f}")
    print(json.dumps(results))


main()
