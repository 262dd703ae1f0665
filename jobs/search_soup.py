"""Search over keys of a recipe in a job.

    ray job submit --working-dir jobs -- python search_soup.py learn_soup.yaml OUT [KEY=VALUE]...

Exit codes are those of `ray-soup search`. Paths: see learn_soup.py.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
