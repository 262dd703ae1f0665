"""The validated, frozen description of a run; YAML in and out; unknown keys refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ray_soup.errors import RecipeError

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Method = Literal["best_single", "uniform", "greedy", "learned", "learned+", "mehl", "mehl+"]

DISTRIBUTIONS = ("loguniform", "uniform", "randint", "choice", "grid")
SOFTMAX = ("learned", "learned+")
SOFTMAX_LEARN = {"lr": 0.05, "batch_size": 256, "cosine_lr": False}  # Wortsman et al. 2022
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "learned": {"blocks": "model", "learn": SOFTMAX_LEARN},
    "learned+": {"blocks": "tensor", "learn": SOFTMAX_LEARN},
    "mehl": {"blocks": "model"},
    "mehl+": {"blocks": "tensor"},
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Data(Section):
    """Where the labelled images are: `.npz`, Parquet, a folder of CLASS/image files or of a saved `datasets.Dataset`, or
    `module:function`. Held-out data: no ingredient saw it."""

    train: str | None = None
    """What `finetune` trains on."""
    fit: str | None = None
    """Held-out data that the coefficients learn on."""
    select: float | str = 0.2
    """Held-out data that choices are made on: a source of its own, or this share of `fit`."""
    test: str | dict[str, str] | None = None
    """Data that is only reported on: one set, or several by names, as in {v2: v2.parquet, sketch: sketch.parquet}, each of
    which has its own figures, as in test_v2_accuracy."""

    def sources(self) -> dict[str, str]:
        """What is evaluated on, by the names that figures have: fit, select where it is a source of its own, and test, or
        test_NAME for each of several."""
        found = {"fit": self.fit, "select": self.select if isinstance(self.select, str) else None}
        tests = self.test if isinstance(self.test, dict) else {"": self.test}
        found |= {f"test_{name}" if name else "test": spec for name, spec in tests.items()}
        return {name: spec for name, spec in found.items() if spec is not None}

    @model_validator(mode="after")
    def _tests_have_names(self) -> Data:
        wrong = [name for name in self.test if not re.fullmatch(r"\w+", name)] if isinstance(self.test, dict) else []
        if wrong or self.test == {}:
            raise ValueError(f"data.test: {wrong or self.test!r} found; names are made of letters, digits and _")
        return self

    @model_validator(mode="after")
    def _select_is_a_share(self) -> Data:
        if isinstance(self.select, float) and not 0 < self.select < 1:
            raise ValueError(f"data.select is {self.select}: give a share between 0 and 1, or a file")
        return self


class Learn(Section):
    lr: float = Field(0.01, gt=0)
    """Learning rate of the unit-scaled coordinates."""
    wd: float = Field(0.0, ge=0)
    """Weight decay, towards the uniform soup."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    cosine_lr: bool = True
    """Linear warm-up, then a cosine to zero, over the steps of one model batch."""
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of the steps that warm up."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the summed projected gradient; null: no bound."""
    batch_size: int = Field(128, ge=1)
    """Images in a step, over all actors."""
    micro_batch: Count | Auto = "auto"
    """Images in one forward pass of one actor."""
    epochs: int = Field(5, ge=1)
    """Passes over fit for each model batch."""
    patience: int | None = Field(None, ge=1)
    """Epochs without a better point on select after which a model batch ends; null: none ends early."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the cross-entropy that coefficients learn by (Szegedy et al. 2016); select is judged without it."""
    model_batch: Count | Auto = "auto"
    """Ingredients whose coordinates move at a time; auto: as many as fit."""
    models_epochs: int = Field(1, ge=1)
    """Passes over all ingredients."""
    seed: int = Field(1, ge=0)


class ActorsSection(Section):
    replicas: Count | Auto = "auto"
    """Whole models; they split the data."""
    shards: Count | Auto = "auto"
    """Actors that together hold one replica."""
    cpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    """CPUs, and threads, of one actor."""
    gpus: float = Field(0, ge=0)
    """GPUs of one actor."""
    wait_s: float = Field(0, ge=0)
    """How long to wait for nodes that are still to come: a cluster that starts, or grows on demand."""


class Directions(Section):
    dtype: Literal["float32", "bfloat16", "int8"] = "int8"
    """How directions are stored while coefficients are learned; the soup itself is made from the original files."""


class Trunk(Section):
    """Hyperparameters of the training that gives every trial its initialisation."""

    lr: float = Field(3e-3, gt=0)
    wd: float = Field(0.05, ge=0)
    epochs: int = Field(25, ge=1)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    shift: int = Field(1, ge=0)
    randaugment: int = Field(0, ge=0, le=30)


class Finetune(Section):
    """Random search for a zoo of ingredients. A value is a number, or one of {loguniform: [low, high]},
    {uniform: [low, high]}, {randint: [low, high]} (high left out) and {choice: [...]}."""

    trials: int = Field(12, ge=1)
    init: str | None = None
    """A checkpoint that every trial starts from."""
    pretrained: str | None = None
    """A checkpoint that lacks the model's last linear layer, or `open_clip:TAG`: the layer is fitted to its features first
    (a linear probe), and every trial starts from that. With neither of the two a trunk is trained."""
    class_names: str | None = None
    """A file of class names, one a line: the layer is made of them by the text tower of `pretrained`, a CLIP, and not
    fitted."""
    templates: list[str] = ["a photo of a {}."]
    """What a class name becomes for the text tower; the mean of them counts."""
    probe_wd: float = Field(1e-4, ge=0)
    """L2 penalty of the linear probe."""
    trunk: Trunk = Trunk()
    lr: Any = {"loguniform": [1e-6, 1e-4]}
    wd: Any = {"loguniform": [1e-4, 0.63]}
    epochs: Any = {"randint": [4, 17]}
    label_smoothing: Any = {"choice": [0.0, 0.1]}
    mixup: Any = {"choice": [0.0, 0.2]}
    """Alpha of the Beta distribution that mixes pairs of images; 0: no mixing."""
    shift: Any = 0
    """Largest random translation in pixels."""
    randaugment: Any = {"randint": [0, 21]}
    """Magnitude of RandAugment, 0 to 30; 0: none."""
    workers_per_model: int = Field(1, ge=1)
    """Workers that train one model together, with Ray Train, each on its part of every batch."""
    batch_size: int = Field(64, ge=1)
    seed: int = Field(1, ge=0)


class Search(Section):
    """What `search` tries: recipe keys (`learn.lr`, `learn.model_batch`, `blocks`, ...), each with a distribution as in
    `finetune` or {grid: [...]}. Default: learn.lr and learn.model_batch."""

    trials: int = Field(16, ge=1)
    """How many, the recipe as it is being the first; with a grid, its points instead."""
    metric: Literal["select_nll", "select_accuracy"] = "select_nll"
    algorithm: Literal["random", "optuna"] = "random"
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials that are behind; never the first."""
    loggers: list[Literal["wandb", "mlflow"]] = []
    """Where Tune reports to besides TensorBoard files. Projects, servers and keys are taken from their own environment
    variables."""
    time_budget_s: float | None = Field(None, gt=0)
    """After which the best so far is taken."""
    space: dict[str, Any] = {}
    """Recipe keys and their distributions; they may stand beside `trials` too."""

    @model_validator(mode="before")
    @classmethod
    def _keys_into_space(cls, values: Any) -> Any:
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
                own[key] = value  # is refused as unknown
        return {**own, "space": space}


class Greedy(Section):
    keep: Literal[">=", ">"] = ">="
    """An ingredient is kept if the accuracy with it is >= (Wortsman et al. 2022), or >, than without."""


class Recipe(Section):
    method: Method = "mehl+"
    ingredients: str | list[str] | None = None
    """Glob, list or folder of checkpoints that started from one initialisation."""
    model: str
    """`open_clip:NAME?classes=N` (`&normalize=true`: features of unit length) or `?zeroshot=FILE&template=a photo of a {}.`,
    `timm:NAME?classes=N`, `torchvision:NAME?classes=N`, `transformers:FOLDER` (`?classes=N&length=128`), or
    `package.module:function` that returns the model."""
    base_model: str | None = None
    """What the ingredients were fine-tuned from, as the Hub knows it; for the model card."""
    data: Data = Data()
    blocks: Literal["tensor", "layer", "model"] | int = "model"
    """What shares a coefficient: every tensor, a layer, the model, or tensors in a row up to a least size in numbers.
    Default: tensor for the "+" methods, model for the others."""
    buffers: Literal["auto", "recalibrate", "average", "first"] = "auto"
    """Buffers: floats averaged and integers held to agree, or all taken from the first ingredient; of the ingredients
    that the soup uses. recalibrate: averaged, and the running statistics of BatchNorm layers computed anew on fit. auto:
    recalibrate where the ingredients' running statistics differ and there is a fit."""
    greedy: Greedy = Greedy()
    learn: Learn = Learn()
    loss: str | None = None
    """`package.module:function` (logits float32 [n, classes], labels int64 [n]) -> losses [n], or their sum, in place of
    cross-entropy: what coefficients learn by and are stopped by on select. Reported NLL stays NLL."""
    metric: str | None = None
    """`package.module:function` (logits, labels) -> scores [n], more is better: their mean is reported as `metric` beside
    accuracy. It is only reported: accuracy and NLL go on making the choices."""
    actors: ActorsSection = ActorsSection()
    directions: Directions = Directions()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward passes while learning and fine-tuning; auto: bfloat16 on a GPU that has it, and on a CPU
    where it is seen to be faster. Results are reported in float32."""
    out_dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """What the soup's floats are written in; keep: the widest dtype that the ingredients hold a tensor in."""
    shard_size: str | int | None = None
    """Largest file of the soup, in bytes or as in 5GB; a larger model is written in several, with an index. null: one."""
    finetune: Finetune = Finetune()
    search: Search = Search()

    @model_validator(mode="after")
    def _functions(self) -> Recipe:
        for key in ("loss", "metric"):
            spec = getattr(self, key)
            if spec is not None and not is_function(spec):
                raise ValueError(f"{key}: {spec!r} found; expected package.module:function")
        if self.loss is not None and self.learn.label_smoothing:
            raise ValueError("learn.label_smoothing belongs to cross-entropy: leave it out, or let `loss` smooth")
        return self

    @field_validator("shard_size")
    @classmethod
    def _shard_size_in_bytes(cls, value: str | int | None) -> int | None:
        if value is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]?)b?", str(value).lower())
        nbytes = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]] if found else 0
        if nbytes < 1:
            raise ValueError("give a size of 1 byte or more, as in 5GB")
        return int(nbytes)

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        method = values.get("method", "mehl+")
        defaults = METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}
        return _merge(defaults, {k: v for k, v in values.items() if not (k == "learn" and v is None)})


def for_method(recipe: Recipe, method: str, **learn: Any) -> Recipe:
    """The same recipe for another method: what is tuned to a method (learning rate, schedule, batch size, blocks) is kept
    only for methods of the same kind, softmax or hyperplane; the others take their defaults. `learn` comes last."""
    values = recipe.model_dump(exclude={"method", "learn", "blocks"})
    kept = recipe.learn.model_dump()
    if (method in SOFTMAX) != (recipe.method in SOFTMAX):
        kept = {key: kept[key] for key in ("epochs", "micro_batch", "seed", "patience", "label_smoothing")}
    if method == recipe.method:
        values["blocks"] = recipe.blocks
    return Recipe.model_validate({**values, "method": method, "learn": {**kept, **learn}})


def changed(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    """The recipe with other values for some keys, as in {"learn.lr": 0.1, "blocks": "layer"}. Raises RecipeError."""
    values = (for_method(recipe, config["method"]) if "method" in config else recipe).model_dump()
    changes: dict[str, Any] = {}
    for key, value in config.items():
        changes = _merge(changes, _nested(key, value))
    changes.pop("method", None)
    return make_recipe(_merge(values, _absolute_paths(changes, Path.cwd())), f"the recipe with {config}")


def is_function(spec: str) -> bool:
    """True for `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) is not None


def absolute(spec: str, folder: Path) -> str:
    """A path as seen from `folder`; URIs and `module:function` stay what they are."""
    if "://" in spec or is_function(spec):
        return spec
    return str(folder.absolute() / Path(spec).expanduser())


def _absolute_model(spec: str, folder: Path) -> str:
    """The folder of `transformers:FOLDER`, where there is one, and the file of `?zeroshot=FILE` as seen from `folder`."""
    name, mark, query = spec.partition("?")
    library, _, path = name.partition(":")
    if library == "transformers" and Path(absolute(path, folder)).is_dir():
        name = f"{library}:{absolute(path, folder)}"
    return name + mark + re.sub(r"(?<=\bzeroshot=)[^&]+", lambda file: absolute(file[0], folder), query)


def _absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    values = dict(values)
    if "ingredients" in values:
        spec = values["ingredients"]
        if isinstance(spec, str):
            values["ingredients"] = absolute(spec, folder)
        elif isinstance(spec, list):
            values["ingredients"] = [absolute(s, folder) if isinstance(s, str) else s for s in spec]
    if isinstance(values.get("model"), str):
        values["model"] = _absolute_model(values["model"], folder)
    for section, keys in {
        "data": ("train", "fit", "select", "test"),
        "finetune": ("init", "pretrained", "class_names"),
    }.items():
        if isinstance(values.get(section), dict):
            given = values[section]
            values[section] = {k: _absolute(v, folder) if k in keys else v for k, v in given.items()}
    return values


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return type(value)({name: _absolute(v, folder) for name, v in value.items()})
    return absolute(value, folder) if isinstance(value, str) else value


class _Whole(dict[str, Any]):
    """A mapping that takes the place of another one."""


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`learn.lr`, 0.02 -> `{"learn": {"lr": 0.02}}`. Keys of a section are added to what is there; another mapping, such as
    `{uniform: [0, 1]}`, takes its place."""
    section: Any = Recipe
    for part in key.split("."):
        section = _below(section, part)
    value = _whole(section, value)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _below(section: Any, key: str) -> Any:
    """The type of a section's key; None for what is no section, or has no such key."""
    return section.model_fields[key].annotation if _is_section(section) and key in section.model_fields else None


def _whole(section: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if _is_section(section):
        return {key: _whole(_below(section, key), inner) for key, inner in value.items()}
    return _Whole(value)


def _merge(into: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = type(into)(into)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and not isinstance(value, _Whole)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`["learn.lr=0.02"]` -> `{"learn": {"lr": 0.02}}`. Relative paths are seen from the current folder."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"'{override}' is not an override. Write key=value, as in learn.lr=0.02.")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"The value of the override '{override}' is not YAML: {error}") from error
        if isinstance(value, str):  # YAML takes 1e-3 for text; a person means a number
            with suppress(ValueError):
                value = float(value)
        values = _merge(values, _nested(key, value))
    return _absolute_paths(values, Path.cwd())


def make_recipe(values: dict[str, Any], source: str = "the recipe") -> Recipe:
    """Validate `values`. Raises RecipeError with a line for each fault, and near names for unknown keys."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for fault in error.errors():
            key, text = _explain(fault)
            lines.setdefault(key, []).append(text)
        raise RecipeError(
            f"{source} is not valid:\n" + "\n".join(f"  {key}{'; or '.join(texts)}" for key, texts in lines.items())
        ) from None


def _explain(fault: Any) -> tuple[str, str]:
    """What pydantic found, as ("key: ", "what is wrong with it")."""
    section: Any = Recipe
    where: list[str] = []
    for part in fault["loc"]:  # the location goes on into the branches of a union: stop at the last field
        if not _is_section(section):
            break
        where.append(str(part))
        section = _below(section, part)
    key = ".".join(where)
    if fault["type"] == "extra_forbidden":
        parent: Any = Recipe
        for part in where[:-1]:
            parent = _below(parent, part)
        near = difflib.get_close_matches(where[-1], list(parent.model_fields), n=1)
        prefix = ".".join(where[:-1] + [""])
        hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known here: {', '.join(parent.model_fields)}."
        return f"{key}: ", f"unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{key}: ", "missing."
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type" and isinstance(section, type):
        message = f"Expected keys below it: {', '.join(section.model_fields)}."
    found = repr(fault["input"])
    found = found if len(found) <= 80 else f"{found[:80]}..."
    return (f"{key}: " if key else ""), f"{found} found. {message}" if key else message


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = (), method: str | None = None) -> Recipe:
    """Read a recipe from YAML. Its relative paths are seen from its own folder, those of `overrides` from the current
    one. With another `method` than the recipe's it is read as `for_method` says. Raises RecipeError."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        found = {list: "is a list", str: "is plain text", type(None): "is empty"}.get(type(values), f"is {values!r}")
        raise RecipeError(f"The recipe {path} {found}; expected keys such as 'model:', 'ingredients:' and 'data:'.")
    values = _absolute_paths(values, path.absolute().parent)
    changes, source = parse_overrides(overrides), f"The recipe {path}"
    recipe = make_recipe(_merge(values, changes), source)
    if method is None or method == recipe.method:
        return recipe
    other = for_method(make_recipe(values, source), method).model_dump()
    return make_recipe(_merge(other, {**changes, "method": method}), source)


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe as it is, from its keys (relative paths seen from the current folder), or from a YAML file. Raises
    RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return make_recipe(_absolute_paths(dict(recipe), Path.cwd()))
    return load_recipe(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; loading it again gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
