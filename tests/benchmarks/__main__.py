"""Run benchmarks by name; without a name, all but those on request. Prints a table, then one line of JSON.

Options behind the name are those of `commands`, `optimizers` or `zoos`; `gpu` has one, --dry.
"""

import importlib
import json
import sys

USUAL = ("ingredients", "greedy", "step", "limits", "quality", "scaling", "growth", "plans", "batchnorm", "chaos")
NAMES = (
    *USUAL, "commands", "devices", "disk", "driver", "fuzz", "golden", "gpu", "large", "laws", "nodes", "optimizers",
    "trajectories", "zoos",
)  # fmt: skip


def main() -> None:
    """Run what the command line names."""
    own_options = sys.argv[1:2] in (["commands"], ["optimizers"], ["zoos"])
    names = sys.argv[1:2] if own_options else [name for name in sys.argv[1:] if name not in ("tiny", "--dry")] or USUAL
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
