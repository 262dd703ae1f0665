"""Compare every soup as a job:

    ray job submit --working-dir jobs -- python compare_soups.py learn_soup.yaml OUT [--seeds 5] [KEY=VALUE]...

It ends with the exit codes of `ray-soup compare`; paths are as for learn_soup.py.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
