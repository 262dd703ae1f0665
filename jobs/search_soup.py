"""Search for a soup's settings as a job:

    ray job submit --working-dir jobs -- python search_soup.py learn_soup.yaml OUT [KEY=VALUE]...

It ends with the exit codes of `ray-soup search`; paths are as for learn_soup.py.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
