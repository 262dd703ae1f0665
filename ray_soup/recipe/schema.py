"""The keys of a recipe: types, bounds, defaults and checks. Unknown keys are an error."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from ray_soup.errors import RecipeError
from ray_soup.recipe.blocks import Blocks
from ray_soup.recipe.comparing import Compare
from ray_soup.recipe.distributions import fault_of, points
from ray_soup.recipe.explain import Fault, FaultsError, below, faults_of, is_section, unknown_key
from ray_soup.recipe.fields import (
    MOST_ACTORS,
    MOST_TRIALS,
    ActorCount,
    Auto,
    Function,
    Line,
    Loggers,
    PathText,
    Section,
    line,
    refusal,
    share,
)
from ray_soup.recipe.learning import Learn
from ray_soup.recipe.methods import DEFAULT_METHOD, EXPECTED, LEARNED, MethodInfo, find_method, method_info
from ray_soup.recipe.plain import plain, shown
from ray_soup.recipe.preprocessing import Preprocessing
from ray_soup.recipe.tuning import Finetune, Polish, Search

ObjectiveName = Literal[
    "auto", "classification", "token_classification", "segmentation", "masked_lm", "causal_lm", "multi_label", "regression"
]
UNSAID = (None, "auto", "nll")
"""Values of select_by with which a search goes by the NLL on select."""
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


class Data(Section):
    """Sources of labeled data.

    A source is an `.npz` file, Parquet, a folder with one folder of images per class, a saved `datasets.Dataset`, or
    `module:function`. No ingredient may have been trained on fit, select or test.
    """

    train: PathText | None = None
    """Training data for `finetune`."""
    fit: PathText | None = None
    """Held-out data that the coefficients are learned on."""
    select: float | PathText = 0.2
    """Held-out data for choices, such as when to stop: a source, or the share of fit that is set aside for this."""
    test: PathText | dict[str, PathText] | None = None
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
        wrong = [name for name in value if not re.fullmatch(r"\w{1,100}", name)] if isinstance(value, dict) else []
        if wrong or value == {}:
            found = f", not {', '.join(map(shown, wrong[:3]))}" if wrong else ""
            raise ValueError(f"Expected one or more names of letters, digits and underscores{found}.")
        return value

    @field_validator("select", mode="before")
    @classmethod
    def _check_share(cls, value: Any) -> Any:
        is_share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1
        if not is_share and not isinstance(value, str):
            raise ValueError("Expected a share between 0 and 1, or a file.")
        return value


class ActorsSection(Section):
    """The Ray actors that evaluate and learn."""

    replicas: ActorCount | Auto = "auto"
    """Number of models that process parts of every batch in parallel."""
    shards: ActorCount | Auto = "auto"
    """Number of actors that together hold one replica."""
    cpus: Annotated[float, Field(ge=0, le=4096), AfterValidator(share)] | Auto = "auto"
    """CPUs per actor; also its number of threads."""
    gpus: Annotated[float, AfterValidator(share)] = Field(default=0, ge=0, le=128)
    """GPUs per actor: a share of one, or a whole number."""
    by_layer: bool = False
    """Hold the parameters of one layer of the model at a time, and their gradient: memory does not grow with the number of
    layers. Takes more time: a layer is mixed again for each micro-batch, and computed twice. Needs shards: 1."""
    wait_s: float = Field(default=0, ge=0, le=604_800)
    """Seconds to wait for nodes to join, on a cluster that is starting or scales on demand; at most a week."""

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, value: float) -> float:
        if value > 1 and not float(value).is_integer():
            raise ValueError("Expected a whole number, or a share between 0 and 1. Round it.")
        return value

    @model_validator(mode="after")
    def _check_actors(self) -> ActorsSection:
        asked = math.prod(n for n in (self.replicas, self.shards) if n != "auto")
        if asked > MOST_ACTORS:
            raise ValueError(
                f"{self.replicas} replicas x {self.shards} shards are {asked:,} actors. Expected at most {MOST_ACTORS:,}."
            )
        if self.by_layer and self.shards not in ("auto", 1):
            raise ValueError(f"by_layer is true, and shards is {self.shards}. Expected shards: 1, or by_layer: false.")
        return self


class Directions(Section):
    """The store of directions on each node's disk."""

    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "int8"
    """Precision of the stored directions while learning. The soup itself is computed from the original files. int4 takes
    about half the memory and disk space of int8; directions are then accurate to about 10 %, not 1 %."""


class Adapter(Section):
    """What is written if the ingredients are LoRA adapters."""

    rank: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    """Largest rank of a module: larger ones are truncated to the nearest product of this rank. null: exact, the sum of the
    ranks of the adapters in use."""
    merge: bool = False
    """Write a whole model, the base with the changes of the soup, instead of an adapter."""

    @model_validator(mode="after")
    def _check_form(self) -> Adapter:
        if self.merge and self.rank is not None:
            raise ValueError(
                f"rank is {self.rank} and merge is true. Expected one of them: a merged model is as large as its base, "
                "whatever the rank."
            )
        return self


class Greedy(Section):
    """Settings of the greedy method."""

    keep: Literal[">=", ">"] = ">="
    """Keep an ingredient if the soup's accuracy with it is >= (Wortsman et al. 2022) or > the accuracy without it."""


class Schedule(Section):
    """Settings of the methods `schedule:...` and `ema`, which mix the last steps of one training run."""

    window: Annotated[int, Field(ge=2, le=1_000_000)] | Auto = "auto"
    """Number of last checkpoints to mix. auto: for `ema` all of them, otherwise the number that is best on select."""
    decay: Annotated[float, Field(gt=0, lt=1)] | Auto = "auto"
    """Decay of `ema` from one checkpoint to the next. auto: the one of 0.5, 0.8, 0.9, 0.95, 0.98 and 0.99 that is best on
    select."""


class Recipe(Section):
    """The description of a run."""

    method: str = DEFAULT_METHOD
    """best_single, uniform, greedy, learned, learned+, mehl or mehl+; for the steps of one run also last, schedule:uniform,
    schedule:linear, schedule:cosine, schedule:minus_sqrt or ema. `package.module:function` is a method of yours: a function
    (session) that returns coefficients or a model; so is the name of an installed entry point `ray_soup.methods`."""
    ingredients: PathText | Annotated[list[PathText], Field(min_length=1)] | None = None
    """Checkpoints that started from one initialization: a glob, a list, a folder, a URI, or the folder of a Ray Tune or
    Ray Train experiment. `RUN?per_trial=last:N` or `=all` takes the last N or all checkpoints of a training run."""
    ignore: list[Line] = Field(default=[], max_length=1000)
    """Tensors of the checkpoints to leave out, as glob patterns of names; for tensors that the model does not have."""
    model: Line
    """`open_clip:NAME?classes=N` (with `&normalize=true`: features of unit length) or
    `open_clip:NAME?zeroshot=FILE&template=a photo of a {}.`, `timm:NAME?classes=N`, `torchvision:NAME?classes=N`,
    `transformers:FOLDER` (`?classes=N&length=128`), or `package.module:function` that returns the model."""
    preprocess: Function | Preprocessing | None = None
    """How images are preprocessed, if neither the checkpoints nor options of `model` say so: a mapping with some of size,
    mean, std, crop_pct, interpolation and channels, of which the model's library makes its own transform; or
    `package.module:function` from a PIL image in RGB to an array or tensor, always of one shape. Values that contradict the
    checkpoints or the options of `model` are refused. It replaces the preprocessing that the function of a model returns.
    null: as the model's library does by default, with a note."""
    base_model: Annotated[str, Field(max_length=200), AfterValidator(line)] | None = None
    """Name on the Hugging Face Hub of the model that the ingredients were fine-tuned from, for the model card."""
    data: Data = Data()
    blocks: Blocks = "model"
    """Which parameters share a coefficient: those of a tensor, of a layer, of the model, or of consecutive tensors until
    a block has at least this many parameters; or {tensor: R}: each of R groups of neighbouring rows of a tensor has its own.
    Default: tensor for the methods with a "+", model for the others."""
    buffers: Literal["auto", "recalibrate", "average", "first"] = "auto"
    """Buffers of the soup. average: the mean of floating-point buffers over the ingredients in use; integers are those of
    the first ingredient. first: the buffers of the first ingredient. recalibrate: average, but the running statistics of
    BatchNorm layers are re-estimated on fit. auto: recalibrate the layers whose running statistics differ between
    ingredients if data.fit is given, else average them; other floating-point buffers that differ are refused. The buffers
    of spectral normalization are always recomputed from the weights."""
    adapter: Adapter = Adapter()
    greedy: Greedy = Greedy()
    schedule: Schedule = Schedule()
    learn: Learn = Learn()
    start: PathText | None = None
    """For mehl and mehl+: folder or URI of a finished soup of this model whose coefficients learning begins from, as after
    ingredients were added or removed. If the uniform soup is better on select, learning begins there. null: as
    learn.screen says."""
    polish: Polish | None = None
    """Training of all weights after the soup is made: the result is no longer an average of the ingredients. null: off."""
    objective: ObjectiveName | Function = "auto"
    """What the model is trained for: classification, token_classification, segmentation, masked_lm, causal_lm,
    multi_label, regression, or `package.module:Class`, a subclass of ray_soup.Objective. auto: what the config of a model
    of transformers says, otherwise classification."""
    select_by: Literal["auto", "nll", "accuracy", "metric"] = "auto"
    """The figure on held-out data that makes every choice: the stopping point, the ranking of ingredients, which of them
    greedy keeps, the best row of a comparison. auto: NLL to stop and to choose a row, accuracy to rank and for greedy; NLL
    for all of them where accuracy has no meaning."""
    loss: Function | None = None
    """`package.module:function` (outputs float32, targets) -> losses [n] or their sum; for classification the outputs are
    logits [n, classes] and the targets labels int64 [n]. It replaces the loss that the coefficients minimize on fit and
    that decides on select when to stop. Reports still show the NLL."""
    metric: Function | None = None
    """`package.module:function` (outputs, targets) -> scores [n], higher is better. Its mean is reported as `metric`; it
    makes choices only with select_by: metric."""
    evaluate: Function | None = None
    """`package.module:function` (folder) -> {name: number}, for figures that other programs compute: called with the folder
    of every finished model, which its own library can load. The numbers are reported under their names; no choice depends on
    them."""
    baseline: Literal["best_single", "none"] = "best_single"
    """The ingredient that a soup is compared with on select. none: skip it; evaluating every ingredient on select takes
    time. learn.screen evaluates them, too."""
    actors: ActorsSection = ActorsSection()
    directions: Directions = Directions()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward and backward passes in learning and fine-tuning. auto: bfloat16 on a GPU that supports it, and
    on a CPU if it measures faster. Results are computed in float32, or in the dtype in `model`, which excludes this key."""
    out_dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the soup's floating-point tensors. keep: for each tensor the widest dtype among the ingredients."""
    out_format: Literal["safetensors", "dcp"] = "safetensors"
    """Files of the soup: safetensors, or a distributed checkpoint for torch.distributed.checkpoint.load. Adapters are always
    safetensors."""
    shard_size: int | None = None
    """Largest file of the soup, in bytes or as in 5GB. A larger model is split into several files with an index. null: one
    file."""
    loggers: Loggers = Field(default=[])
    """Trackers that runs report to while they run, in addition to TensorBoard files: wandb, mlflow. Projects, servers and
    keys come from the environment variables of these tools."""
    compare: Compare = Compare()
    finetune: Finetune = Finetune()
    search: Search = Search()

    def __init__(self, **values: Any) -> None:
        """Check the keys of a recipe. Raises RecipeError with one line for each invalid key."""
        try:
            super().__init__(**plain(values))
        except ValidationError as error:
            raise RecipeError("\n  ".join(["The recipe is not valid:", *map(str, faults_of(error, Recipe))])) from error

    @property
    def info(self) -> MethodInfo:
        """The entry of this recipe's method in the table of methods."""
        return method_info(self.method)

    @model_validator(mode="before")
    @classmethod
    def _apply_method_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value is not None or not is_section(below(cls, key))}
        info = find_method(values.get("method", DEFAULT_METHOD))
        if info is None:
            return values
        search = values.get("search")
        if isinstance(search, dict) and search.get("metric") == "select_nll" and values.get("select_by") in UNSAID:
            values["search"] = {**search, "metric": "auto"}  # the same, and what a dump of auto says
        learn = values.get("learn", {})
        return {"blocks": info.blocks, **values, "learn": {**info.learn, **learn} if isinstance(learn, dict) else learn}

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        if find_method(value) is None:
            raise ValueError(f"Expected {EXPECTED}.")
        return value

    @field_validator("preprocess", mode="before")
    @classmethod
    def _check_preprocess(cls, value: Any) -> Any:
        """Validate a mapping by itself, so that its faults are not those of a function's name."""
        if not isinstance(value, dict):
            return value
        try:
            return Preprocessing.model_validate(value)
        except ValidationError as error:
            faults = faults_of(error, Preprocessing)
            raise FaultsError([Fault(f"preprocess.{f.key}".strip("."), f.message) for f in faults]) from None

    @field_validator("shard_size", mode="before")
    @classmethod
    def _shard_size_in_bytes(cls, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63
        text = value.lower() if isinstance(value, str) and len(value) < 50 else str(value) if whole else ""
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmg]?)b?", text)
        nbytes = float(found[1]) * _UNITS[found[2]] if found else 0
        if not 1 <= nbytes < 2**63:
            raise ValueError("Expected a size of 1 byte or more, as in 5GB.")
        return int(nbytes)

    @model_validator(mode="after")
    def _check_smoothing(self) -> Recipe:
        if self.loss is not None and self.learn.label_smoothing:
            message = (
                f"found {self.learn.label_smoothing} together with loss: {self.loss}. Label smoothing applies to "
                "cross-entropy only: remove this key, or smooth the labels in your loss."
            )
            raise FaultsError([Fault("learn.label_smoothing", message)])
        return self

    @model_validator(mode="after")
    def _check_learning(self) -> Recipe:
        if self.learn.whiten and self.info.kind == "softmax":
            message = (
                f"found {self.learn.whiten:g} with method: {self.method}, which has no directions to whiten. Remove this "
                "key, or use mehl+."
            )
            raise FaultsError([Fault("learn.whiten", message)])
        if self.learn.lr == "auto" and self.info.kind == "softmax":
            message = f"found auto with method: {self.method}. Expected a number, as in 0.05, or mehl+."
            raise FaultsError([Fault("learn.lr", message)])
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Recipe:
        if self.start is not None and self.info.kind != "hyperplane":
            message = f"found {shown(self.start)} with method: {self.method}. Expected mehl or mehl+, or no `start`."
            raise FaultsError([Fault("start", message)])
        return self

    @model_validator(mode="after")
    def _check_space(self) -> Recipe:
        space = self.search.space
        if len(space) > 100:
            raise FaultsError([Fault("search", f"found {len(space):,} keys. Expected at most 100.")])
        faults = [
            Fault(f"search.{key}", fault) for key, value in space.items() if (fault := self._fault_in_space(key, value))
        ]
        if not faults and points(space) > MOST_TRIALS:
            faults = [
                Fault(
                    "search", f"the grid has {points(space):,} points, one trial for each. Expected at most {MOST_TRIALS:,}."
                )
            ]
        if faults:
            raise FaultsError(faults)
        return self

    def _fault_in_space(self, key: str, value: Any) -> str | None:
        """Return what is wrong with a key of search.space."""
        parts = key.split(".")
        kind: Any = Recipe
        for part in parts:
            kind = below(kind, part)
        if kind is None and len(parts) < 10:
            near = unknown_key(Recipe, parts)
            return f"the recipe has no key {shown(key)}. {near[0].upper()}{near[1:]} Write a key with its section: learn.lr."
        if kind is None or is_section(kind) or parts[0] in FIXED_IN_SEARCH:
            return f"a search cannot vary this key. Expected a key of {', '.join(SEARCHED)}."
        if key == "learn.seed" and not isinstance(self.data.select, str):
            return "each seed cuts its own select data from fit, so trials cannot be compared. Remove this key."

        def refuse(one: Any) -> str | None:
            if key == "method":
                return None if one in LEARNED else f"one of {', '.join(LEARNED)}"
            nested = one
            for part in reversed(parts):
                nested = {part: nested}
            return refusal(Recipe, {"model": self.model, **nested}, key)

        fault = fault_of(value, refuse)
        return f"found {shown(value)}. {fault}" if fault else None


FIXED_IN_SEARCH = (
    "ingredients", "ignore", "model", "preprocess", "base_model", "data", "objective", "select_by", "metric",
    "evaluate", "baseline", "schedule", "loggers", "compare", "finetune", "search", "start", "polish",
)  # fmt: skip
"""Keys that all trials of a search share: trials with other data, ingredients or models cannot be compared."""
SEARCHED = tuple(key for key in Recipe.model_fields if key not in FIXED_IN_SEARCH)
