"""Fine-tune a zoo of ingredients in a job.

    ray job submit --working-dir jobs -- python finetune_zoo.py RECIPE.yaml OUT [KEY=VALUE]...

Exit codes are those of `ray-soup finetune`. Paths: see learn_soup.py.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
