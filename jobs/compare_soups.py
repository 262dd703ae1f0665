"""Compare every soup in a job.

    ray job submit --working-dir jobs -- python compare_soups.py learn_soup.yaml OUT [--seeds 5] [KEY=VALUE]...

Exit codes are those of `ray-soup compare`. Paths: see learn_soup.py.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
