"""Learn soups in your own tuner.

    ray job submit --working-dir jobs -- python own_tuner.py learn_soup.yaml EXPERIMENT_FOLDER OUT [KEY=VALUE]...

Use any search space, search algorithm, scheduler and callbacks of Ray Tune. Each trial learns one soup and reports
`select_nll` after every epoch. The soup of the best trial is written to OUT. Paths: see learn_soup.py.
"""

import sys

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from ray_soup.recipe import load_recipe
from ray_soup.tune.trainable import soup_of, soup_resources, soup_trainable

if __name__ == "__main__":
    recipe_file, experiment, out = sys.argv[1:4]
    recipe = load_recipe(recipe_file, sys.argv[4:])
    tuner = tune.Tuner(
        tune.with_resources(soup_trainable(recipe), soup_resources(recipe)),
        param_space={"learn.lr": tune.loguniform(1e-3, 1e-1), "blocks": tune.choice(["tensor", "layer"])},
        tune_config=tune.TuneConfig(
            metric="select_nll",
            mode="min",
            num_samples=8,
            scheduler=ASHAScheduler("percent", max_t=100, grace_period=50),
        ),
        run_config=tune.RunConfig(storage_path=experiment, name="soups"),
    )
    best = tuner.fit().get_best_result()
    print(best.config, best.metrics["select_nll"])
    print(soup_of(recipe, best, out).out)
