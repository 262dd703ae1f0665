"""Learn a soup as a job:

    ray job submit --working-dir jobs -- python learn_soup.py learn_soup.yaml OUT [KEY=VALUE]...

The driver needs no GPU and hardly a CPU; the actors run where the cluster has room. It ends with the exit codes of
`ray-soup`. Ingredients, data and OUT are paths that every node sees, or URIs.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["learn", *sys.argv[1:]])
