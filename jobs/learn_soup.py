"""Learn a soup in a job.

    ray job submit --working-dir jobs -- python learn_soup.py learn_soup.yaml OUT [KEY=VALUE]...

Ingredients, data and OUT are paths that exist on every node, or URIs. The driver needs no GPU and little CPU; the actors run
wherever the cluster has room. Exit codes are those of `ray-soup learn`.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["learn", *sys.argv[1:]])
