"""Run benchmarks by name; without a name, all but those on request. Prints a table, then one line of JSON.

Options behind the name are those of `zoos`, the only benchmark that has any.
"""

import importlib
import json
import sys

USUAL = ("ingredients", "greedy", "step", "limits", "quality", "scaling", "growth", "plans", "batchnorm", "chaos")
NAMES = (*USUAL, "large", "nodes", "fuzz", "disk", "golden", "trajectories", "zoos")


def main() -> None:
    """Run what the command line names."""
    own_options = sys.argv[1:2] == ["zoos"]
    names = ["zoos"] if own_options else [name for name in sys.argv[1:] if name != "tiny"] or USUAL
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"Unknown benchmark: {', '.join(unknown)}. Known: {', '.join(NAMES)}.")
    results = {}
    for name in names:
        results[name] = importlib.import_module(f"tests.benchmarks.{name}").main()
        for key, value in results[name].items():
            print(f"{name:<14} {key:<60} {value:>12,.3f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
