"""Fine-tune a zoo of ingredients as a job:

    ray job submit --working-dir jobs -- python finetune_zoo.py RECIPE.yaml OUT [KEY=VALUE]...

It ends with the exit codes of `ray-soup finetune`; paths are as for learn_soup.py.
"""

import sys

from ray_soup.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
