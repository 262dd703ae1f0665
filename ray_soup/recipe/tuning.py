"""The sections `finetune`, `search` and `polish`: hyperparameters, their distributions, and the options of Ray Tune."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_soup.recipe.distributions import DISTRIBUTIONS, fault_of, is_distribution
from ray_soup.recipe.explain import Fault, FaultsError
from ray_soup.recipe.fields import MOST_TRIALS, ActorCount, Epochs, Examples, Line, Loggers, PathText, Section, Seed, refusal
from ray_soup.recipe.plain import shown

KINDS_OF_FINETUNE = tuple(kind for kind in DISTRIBUTIONS if kind != "grid")


class Trunk(Section):
    """Hyperparameters of the model that all trials of `finetune` start from, if neither init nor pretrained is given."""

    lr: float = Field(default=3e-3, gt=0)
    """Learning rate."""
    wd: float = Field(default=0.05, ge=0, le=1e6)
    """Weight decay."""
    epochs: Epochs = 25
    """Passes over data.train."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing."""
    mixup: float = Field(default=0.0, ge=0, le=1000)
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    shift: int = Field(default=1, ge=0, le=1000)
    """Largest random translation in pixels."""
    randaugment: int = Field(default=0, ge=0, le=30)
    """Magnitude of RandAugment; 0: none."""


class Finetune(Section):
    """Random search for a zoo of ingredients.

    A hyperparameter is a number or a distribution: {loguniform: [low, high]}, {uniform: [low, high]},
    {randint: [low, high]} (high is excluded) or {choice: [...]}.
    """

    trials: int = Field(default=12, ge=1, le=MOST_TRIALS)
    """Number of models to train."""
    init: PathText | None = None
    """Checkpoint that every trial starts from."""
    pretrained: PathText | None = None
    """Checkpoint without the model's last linear layer, or `open_clip:TAG`. The layer is first fitted to the features (a
    linear probe), and every trial starts from the result. Without init and pretrained, a model is trained from scratch."""
    class_names: PathText | None = None
    """File with one class name per line. `pretrained` must then be a CLIP, whose text tower makes the last layer, and no
    linear probe is fitted."""
    templates: list[Line] = Field(default=["a photo of a {}."], min_length=1, max_length=1000)
    """Prompts for class_names. The text features of all prompts are averaged."""
    probe_wd: float = Field(default=1e-4, ge=0, le=1e6)
    """L2 penalty of the linear probe."""
    trunk: Trunk = Trunk()
    """Hyperparameters of the model that is trained from scratch."""
    lr: Any = Field(default={"loguniform": [1e-6, 1e-4]})
    """Learning rate."""
    wd: Any = Field(default={"loguniform": [1e-4, 0.63]})
    """Weight decay."""
    epochs: Any = Field(default={"randint": [4, 17]})
    """Passes over data.train."""
    label_smoothing: Any = Field(default={"choice": [0.0, 0.1]})
    """Label smoothing."""
    mixup: Any = Field(default={"choice": [0.0, 0.2]})
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    shift: Any = 0
    """Largest random translation in pixels."""
    randaugment: Any = Field(default={"randint": [0, 21]})
    """Magnitude of RandAugment, 0 to 30; 0: none."""
    workers_per_model: ActorCount = 1
    """Number of workers that train one model together with Ray Train, each on its part of every batch."""
    batch_size: Examples = 64
    """Examples per step, summed over the workers."""
    seed: Seed = 1
    """Seed of the hyperparameters and of every training run."""

    @field_validator("lr", "wd", "epochs", "label_smoothing", "mixup", "shift", "randaugment")
    @classmethod
    def _check_distribution(cls, value: Any, info: Any) -> Any:
        name = str(info.field_name)
        fault = fault_of(value, lambda one: refusal(Trunk, {name: one}, name), KINDS_OF_FINETUNE)
        if fault:
            raise ValueError(fault)
        return value

    @model_validator(mode="after")
    def _check_start(self) -> Finetune:
        if self.init is not None and self.pretrained is not None:
            message = f"found {shown(self.init)} together with finetune.pretrained. Remove one of the two."
            raise FaultsError([Fault("finetune.init", message)])
        return self

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, value: list[str]) -> list[str]:
        wrong = [template for template in value if "{}" not in template]
        if wrong:
            raise ValueError(f"Expected {{}} in each prompt, where the class name goes; {shown(wrong[0])} has none.")
        return value


class Search(Section):
    """Settings of `search`: which recipe keys vary, and how.

    Recipe keys such as learn.lr, learn.model_batch or blocks each have a distribution as in `finetune`, or {grid: [...]}.
    Default: learn.lr and learn.model_batch.
    """

    trials: int = Field(default=16, ge=1, le=MOST_TRIALS)
    """Number of trials. The first is the unchanged recipe. With a grid, all of its points are tried instead."""
    metric: Literal["auto", "select_nll", "select_accuracy", "select_metric"] = "auto"
    """Figure by which the best trial is chosen; select_metric needs select_by: metric. auto: the one that select_by names,
    otherwise select_nll."""
    algorithm: Literal["random", "optuna"] = "random"
    """Algorithm that proposes the values of the next trial."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials that fall behind, but never the first one."""
    loggers: Loggers = Field(default=[])
    """Loggers that Ray Tune reports the trials to, in addition to TensorBoard files. Default: those of `loggers`."""
    time_budget_s: Annotated[float, Field(gt=0, le=31_536_000)] | None = None
    """Seconds after which the search ends with the best trial so far; null: no limit."""
    space: dict[str, Any] = Field(default={})
    """Recipe keys and their distributions. They may also be written directly in this section."""

    @model_validator(mode="before")
    @classmethod
    def _move_keys_into_space(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        space = {} if own.get("space") is None else own["space"]
        if not isinstance(space, dict):
            return {**values, "space": space}
        space = dict(space)
        for key, value in values.items():
            if key in own:
                continue
            if isinstance(value, dict) and "." not in key and not is_distribution(value):
                space |= {f"{key}.{name}": inner for name, inner in value.items()}
            elif "." in key or isinstance(value, dict):
                space[key] = value
            else:
                own[key] = value  # refused later as an unknown key
        return {**own, "space": space}

    @model_validator(mode="after")
    def _check_options(self) -> Search:
        grids = [key for key, value in self.space.items() if is_distribution(value) and "grid" in value]
        constants = [key for key, value in self.space.items() if not isinstance(value, dict)]
        faults = []
        if grids and self.algorithm != "random":
            message = f"found {self.algorithm} together with a grid of {grids[0]}. Use choice, or remove the algorithm."
            faults.append(Fault("search.algorithm", message))
        if constants and self.algorithm != "random":
            message = f"found {self.algorithm} together with the constant {constants[0]}. Set it in the recipe itself."
            faults.append(Fault("search.algorithm", message))
        if faults:
            raise FaultsError(faults)
        return self


class Polish(Section):
    """Training of all weights on fit, from the finished soup on."""

    epochs: Epochs = 5
    """Passes over fit. The best epoch on select is kept; if none is better than the soup, the soup is left unchanged."""
    lr: float | list[float] = 3e-4
    """Learning rate of AdamW, which warms up over a tenth of the steps and decays to zero along a cosine; or several, of
    which the best on select is kept."""
    wd: float = Field(default=0.0, ge=0, le=1e6)
    """Weight decay."""
    batch_size: Examples = 128
    """Examples per step, summed over all actors."""

    @field_validator("lr", mode="before")
    @classmethod
    def _check_lr(cls, value: Any) -> Any:
        rates = value if isinstance(value, list) and 0 < len(value) <= 100 else [value]
        if not all(isinstance(r, (int, float)) and not isinstance(r, bool) and 0 < r <= 1e6 for r in rates):
            raise ValueError("Expected a number above 0 and up to 1,000,000, or a list of 1 to 100 of them.")
        return value

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try, without duplicates."""
        return tuple(dict.fromkeys(self.lr)) if isinstance(self.lr, list) else (self.lr,)
