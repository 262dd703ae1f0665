"""Run benchmarks by name, all without one: a table, then a line of JSON."""

import importlib
import json
import sys

NAMES = ("ingredients", "greedy", "step", "limits", "quality", "scaling", "growth", "plans", "batchnorm", "chaos")


def main() -> None:
    names = sys.argv[1:] or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    results = {}
    for name in names:
        results[name] = importlib.import_module(f"tests.benchmarks.{name}").main()
        for key, value in results[name].items():
            print(f"{name:<14} {key:<60} {value:>12,.3f}", flush=True)
    print(json.dumps(results))


main()
