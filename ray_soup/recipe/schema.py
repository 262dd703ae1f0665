"""The keys of a recipe: types, defaults and checks. Unknown keys are an error."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ray_soup.recipe.methods import DEFAULT_METHOD, METHODS, MethodInfo
from ray_soup.recipe.paths import is_function

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]

DISTRIBUTIONS = ("loguniform", "uniform", "randint", "choice", "grid")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


class Section(BaseModel):
    """A frozen group of keys. The string under a key is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class Data(Section):
    """Sources of labeled data.

    A source is an `.npz` file, Parquet, a folder with one folder of images per class, a saved `datasets.Dataset`, or
    `module:function`. No ingredient may have been trained on fit, select or test.
    """

    train: str | None = None
    """Training data for `finetune`."""
    fit: str | None = None
    """Held-out data that the coefficients are learned on."""
    select: float | str = 0.2
    """Held-out data for choices, such as when to stop: a source, or the share of fit that is set aside for this."""
    test: str | dict[str, str] | None = None
    """Data used for reporting only: one source, or several with names, as in {v2: v2.parquet, sketch: sketch.parquet}.
    Each named source has its own figures, such as test_v2_accuracy."""

    def sources(self) -> dict[str, str]:
        """List the sources of evaluation data by the prefix of their figures.

        The prefixes are fit, select (only if it is a source and not a share of fit), and test, or test_NAME for each of
        several test sets.
        """
        found = {"fit": self.fit, "select": self.select if isinstance(self.select, str) else None}
        tests = self.test if isinstance(self.test, dict) else {"": self.test}
        found |= {f"test_{name}" if name else "test": spec for name, spec in tests.items()}
        return {name: spec for name, spec in found.items() if spec is not None}

    @field_validator("test")
    @classmethod
    def _check_test_names(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        wrong = [name for name in value if not re.fullmatch(r"\w+", name)] if isinstance(value, dict) else []
        if wrong or value == {}:
            found = f", not {', '.join(map(repr, wrong))}" if wrong else ""
            raise ValueError(f"Expected one or more names of letters, digits and underscores{found}.")
        return value

    @field_validator("select")
    @classmethod
    def _check_share(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("Expected a share between 0 and 1, or a file.")
        return value


class Learn(Section):
    """Settings for learning the coefficients."""

    lr: float = Field(default=0.01, gt=0)
    """Learning rate of the unit-scaled coordinates."""
    wd: float = Field(default=0.0, ge=0)
    """Weight decay. It pulls the soup toward the uniform soup."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the coordinates."""
    cosine_lr: bool = True
    """Warm up linearly, then decay to zero along a cosine, over the steps of one model batch. false: a constant rate."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps that warm up."""
    clip: float | None = Field(default=None, gt=0)
    """Maximum norm of the gradient with respect to the coordinates; null: no clipping."""
    batch_size: int = Field(default=128, ge=1)
    """Examples per step, summed over all actors."""
    micro_batch: Count | Auto = "auto"
    """Examples per forward pass of one actor."""
    epochs: int = Field(default=5, ge=1)
    """Passes over fit for each model batch."""
    patience: int | None = Field(default=None, ge=1)
    """End a model batch after this many epochs without a lower loss on select; null: never end early."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy on fit (Szegedy et al. 2016). The loss on select is not smoothed."""
    model_batch: Count | Auto = "auto"
    """Number of ingredients whose coordinates move at a time; auto: as many as fit into memory."""
    models_epochs: int = Field(default=1, ge=1)
    """Passes over all ingredients, one model batch after another."""
    seed: int = Field(default=1, ge=0)
    """Seed of the split into fit and select, of the order of batches and of the order of ingredients."""


class ActorsSection(Section):
    """The Ray actors that evaluate and learn."""

    replicas: Count | Auto = "auto"
    """Number of models that process parts of every batch in parallel."""
    shards: Count | Auto = "auto"
    """Number of actors that together hold one replica."""
    cpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    """CPUs per actor; also its number of threads."""
    gpus: float = Field(default=0, ge=0)
    """GPUs per actor."""
    wait_s: float = Field(default=0, ge=0)
    """Seconds to wait for nodes to join, on a cluster that is starting or scales on demand."""


class Directions(Section):
    """The store of directions on each node's disk."""

    dtype: Literal["float32", "bfloat16", "int8"] = "int8"
    """Precision of the stored directions while learning. The soup itself is computed from the original files."""


class Trunk(Section):
    """Hyperparameters of the model that all trials of `finetune` start from, if neither init nor pretrained is given."""

    lr: float = Field(default=3e-3, gt=0)
    """Learning rate."""
    wd: float = Field(default=0.05, ge=0)
    """Weight decay."""
    epochs: int = Field(default=25, ge=1)
    """Passes over data.train."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    shift: int = Field(default=1, ge=0)
    """Largest random translation in pixels."""
    randaugment: int = Field(default=0, ge=0, le=30)
    """Magnitude of RandAugment; 0: none."""


class Finetune(Section):
    """Random search for a zoo of ingredients.

    A hyperparameter is a number or a distribution: {loguniform: [low, high]}, {uniform: [low, high]},
    {randint: [low, high]} (high is excluded) or {choice: [...]}.
    """

    trials: int = Field(default=12, ge=1)
    """Number of models to train."""
    init: str | None = None
    """Checkpoint that every trial starts from."""
    pretrained: str | None = None
    """Checkpoint without the model's last linear layer, or `open_clip:TAG`. The layer is first fitted to the features (a
    linear probe), and every trial starts from the result. Without init and pretrained, a model is trained from scratch."""
    class_names: str | None = None
    """File with one class name per line. `pretrained` must then be a CLIP, whose text tower makes the last layer, and no
    linear probe is fitted."""
    templates: list[str] = ["a photo of a {}."]
    """Prompts for class_names. The text features of all prompts are averaged."""
    probe_wd: float = Field(default=1e-4, ge=0)
    """L2 penalty of the linear probe."""
    trunk: Trunk = Trunk()
    """Hyperparameters of the model that is trained from scratch."""
    lr: Any = {"loguniform": [1e-6, 1e-4]}
    """Learning rate."""
    wd: Any = {"loguniform": [1e-4, 0.63]}
    """Weight decay."""
    epochs: Any = {"randint": [4, 17]}
    """Passes over data.train."""
    label_smoothing: Any = {"choice": [0.0, 0.1]}
    """Label smoothing."""
    mixup: Any = {"choice": [0.0, 0.2]}
    """Alpha of mixup's Beta distribution; 0: no mixup."""
    shift: Any = 0
    """Largest random translation in pixels."""
    randaugment: Any = {"randint": [0, 21]}
    """Magnitude of RandAugment, 0 to 30; 0: none."""
    workers_per_model: int = Field(default=1, ge=1)
    """Number of workers that train one model together with Ray Train, each on its part of every batch."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per step, summed over the workers."""
    seed: int = Field(default=1, ge=0)
    """Seed of the hyperparameters and of every training run."""


class Search(Section):
    """Settings of `search`: which recipe keys vary, and how.

    Recipe keys such as learn.lr, learn.model_batch or blocks each have a distribution as in `finetune`, or {grid: [...]}.
    Default: learn.lr and learn.model_batch.
    """

    trials: int = Field(default=16, ge=1)
    """Number of trials. The first is the unchanged recipe. With a grid, all of its points are tried instead."""
    metric: Literal["select_nll", "select_accuracy"] = "select_nll"
    """Figure by which the best trial is chosen."""
    algorithm: Literal["random", "optuna"] = "random"
    """Algorithm that proposes the values of the next trial."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials that fall behind, but never the first one."""
    loggers: list[Literal["wandb", "mlflow"]] = []
    """Loggers that Ray Tune reports to, in addition to TensorBoard files. Projects, servers and keys come from the
    environment variables of these tools."""
    time_budget_s: float | None = Field(default=None, gt=0)
    """Seconds after which the search ends with the best trial so far; null: no limit."""
    space: dict[str, Any] = {}
    """Recipe keys and their distributions. They may also be written directly in this section."""

    @model_validator(mode="before")
    @classmethod
    def _move_keys_into_space(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        space = dict(own.get("space") or {})
        for key, value in values.items():
            if key in own:
                continue
            if isinstance(value, dict) and not (len(value) == 1 and next(iter(value)) in DISTRIBUTIONS):
                space |= {f"{key}.{name}": inner for name, inner in value.items()}
            elif "." in key or isinstance(value, dict):
                space[key] = value
            else:
                own[key] = value  # refused later as an unknown key
        return {**own, "space": space}


class Greedy(Section):
    """Settings of the greedy method."""

    keep: Literal[">=", ">"] = ">="
    """Keep an ingredient if the soup's accuracy with it is >= (Wortsman et al. 2022) or > the accuracy without it."""


class Recipe(Section):
    """The description of a run."""

    method: str = DEFAULT_METHOD
    """best_single, uniform, greedy, learned, learned+, mehl or mehl+."""
    ingredients: str | list[str] | None = None
    """Checkpoints that started from one initialization: a glob, a list, a folder, a URI, or the folder of a Ray Tune or
    Ray Train experiment."""
    model: str
    """`open_clip:NAME?classes=N` (with `&normalize=true`: features of unit length) or
    `open_clip:NAME?zeroshot=FILE&template=a photo of a {}.`, `timm:NAME?classes=N`, `torchvision:NAME?classes=N`,
    `transformers:FOLDER` (`?classes=N&length=128`), or `package.module:function` that returns the model."""
    base_model: str | None = None
    """Name on the Hugging Face Hub of the model that the ingredients were fine-tuned from, for the model card."""
    data: Data = Data()
    blocks: Literal["tensor", "layer", "model"] | int = "model"
    """Which parameters share a coefficient: those of a tensor, of a layer, of the model, or of consecutive tensors until
    a block has at least this many parameters. Default: tensor for the methods with a "+", model for the others."""
    buffers: Literal["auto", "recalibrate", "average", "first"] = "auto"
    """Buffers of the soup. average: the mean of floating-point buffers over the ingredients in use; integer buffers must
    agree. first: the buffers of the first ingredient. recalibrate: average, but the running statistics of BatchNorm layers
    are re-estimated on fit. auto: recalibrate if the ingredients' running statistics differ and data.fit is given, else
    average."""
    greedy: Greedy = Greedy()
    learn: Learn = Learn()
    loss: str | None = None
    """`package.module:function` (logits float32 [n, classes], labels int64 [n]) -> losses [n] or their sum. It replaces
    the cross-entropy that the coefficients minimize on fit and that decides on select when to stop. Reports still
    show the NLL."""
    metric: str | None = None
    """`package.module:function` (logits, labels) -> scores [n], higher is better. Its mean is reported as `metric` next to
    the accuracy and does not influence any choice."""
    actors: ActorsSection = ActorsSection()
    directions: Directions = Directions()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward and backward passes in learning and fine-tuning. auto: bfloat16 on a GPU that supports it, and
    on a CPU if it measures faster. Reported results are always computed in float32."""
    out_dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the soup's floating-point tensors. keep: for each tensor the widest dtype among the ingredients."""
    shard_size: int | None = None
    """Largest file of the soup, in bytes or as in 5GB. A larger model is split into several files with an index. null: one
    file."""
    finetune: Finetune = Finetune()
    search: Search = Search()

    @property
    def info(self) -> MethodInfo:
        """The entry of this recipe's method in the table of methods."""
        return METHODS[self.method]

    @model_validator(mode="before")
    @classmethod
    def _apply_method_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if not (key == "learn" and value is None)}
        method = values.get("method", DEFAULT_METHOD)
        if not isinstance(method, str) or method not in METHODS:
            return values
        info, learn = METHODS[method], values.get("learn", {})
        return {"blocks": info.blocks, **values, "learn": {**info.learn, **learn} if isinstance(learn, dict) else learn}

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        if not isinstance(value, str) or value not in METHODS:
            raise ValueError(f"Expected one of {', '.join(METHODS)}.")
        return value

    @field_validator("shard_size", mode="before")
    @classmethod
    def _shard_size_in_bytes(cls, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value).lower() if isinstance(value, (str, int)) else ""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]?)b?", text)
        nbytes = float(found[1]) * _UNITS[found[2]] if found else 0
        if nbytes < 1:
            raise ValueError("Expected a size of 1 byte or more, as in 5GB.")
        return int(nbytes)

    @field_validator("loss", "metric")
    @classmethod
    def _check_function(cls, value: str | None) -> str | None:
        if value is not None and not is_function(value):
            raise ValueError("Expected package.module:function.")
        return value

    @model_validator(mode="after")
    def _check_smoothing(self) -> Recipe:
        if self.loss is not None and self.learn.label_smoothing:
            raise ValueError(
                f"learn.label_smoothing: found {self.learn.label_smoothing} together with loss: {self.loss}. "
                "Label smoothing applies to cross-entropy only: remove this key, or smooth the labels in your loss."
            )
        return self
