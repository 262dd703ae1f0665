"""What is installed, which devices there are, and what a recipe still needs: for `ray-soup doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ray_soup import __version__
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.adapters import adapters_among
from ray_soup.io.environment import cache_folder, check_environment
from ray_soup.io.find import open_ingredients
from ray_soup.io.lazy import torch
from ray_soup.recipe import Recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.model_spec import ModelSpec

NEEDED = ("torch", "ray", "numpy", "safetensors", "pyarrow", "obstore", "open_clip_torch")
OPTIONAL = {
    "timm": "models of timm", "torchvision": "models of torchvision", "transformers": "models of transformers",
    "peft": "LoRA adapters", "optuna": "search.algorithm: optuna", "wandb": "loggers", "mlflow": "loggers",
}  # fmt: skip
"""Optional packages, and what they are for."""
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT",
    "HF_TOKEN", "HF_HOME", "WANDB_API_KEY", "MLFLOW_TRACKING_URI",
)  # fmt: skip
FILES = {"~/.aws/credentials": "s3://", "~/.config/gcloud/application_default_credentials.json": "gs://",
         "~/.cache/huggingface/token": "hf://"}  # fmt: skip
"""Files in which tools keep credentials, and the storage that they are for."""
BY_SCHEME = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"),
}
LEAST_FREE = 5e9
"""Bytes of free disk below which the cache folder is named as a problem."""


@dataclass
class Diagnosis:
    """What was found."""

    rows: dict[str, str] = field(default_factory=dict)
    """Texts by their names, in order."""
    missing: list[str] = field(default_factory=list)
    """What the recipe needs and is missing, each with what to do."""
    warnings: list[str] = field(default_factory=list)
    """What may go wrong."""


def diagnose(recipe: Recipe | None) -> Diagnosis:
    """Return what is installed here and what a recipe needs; reads headers only, and starts nothing.

    Credentials are listed by the names of their variables and files, never by their values.
    """
    found = Diagnosis()
    found.rows["ray_soup"] = f"{__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    found.rows["packages"] = ", ".join(f"{name} {_version(name) or 'missing'}" for name in NEEDED)
    for name, use in OPTIONAL.items():
        found.rows[f"  {name}"] = _version(name) or f"not installed; for {use}: pip install 'ray_soup[{name}]'"
    found.rows |= _machine()
    _add_cache(found)
    address = os.environ.get("RAY_ADDRESS")
    found.rows["Ray"] = (
        f"RAY_ADDRESS is {address}" if address else "RAY_ADDRESS is not set: a local Ray is started for a run"
    )
    found.rows["credentials"] = ", ".join(_credentials()) or "none in the environment or in the usual files"
    if recipe is not None:
        _examine(recipe, found)
    return found


def _version(name: str) -> str:
    """Return the version of a package; empty if it cannot be imported."""
    for distribution in (name, f"{name}-skinny"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _machine() -> dict[str, str]:
    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [
        f"{torch.cuda.get_device_name(n)}, {torch.cuda.get_device_properties(n).total_memory / 1e9:.1f} GB"
        for n in range(torch.cuda.device_count())
    ]
    return {
        "CPUs": f"{usable}, {psutil.cpu_percent(0.2):.0f} % busy",
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "GPUs": "; ".join(devices) or "none that torch can use",
    }


def _add_cache(found: Diagnosis) -> None:
    try:
        check_environment()
        folder = cache_folder()
    except RecipeError as error:
        found.missing.append(str(error))
        return
    free = shutil.disk_usage(folder).free
    found.rows["cache"] = f"{folder}, {free / 1e9:.1f} GB free"
    if free < LEAST_FREE:
        found.warnings.append(
            f"The cache folder {folder} has {free / 1e9:.1f} GB free; the compressed ingredients are kept there. Set "
            "RAY_SOUP_CACHE to a folder with more room."
        )


def _credentials() -> Iterator[str]:
    """Yield the names of variables and files with credentials."""
    yield from (name for name in CREDENTIALS if os.environ.get(name))
    yield from (name for name in FILES if Path(name).expanduser().exists())


# The recipe


def _examine(recipe: Recipe, found: Diagnosis) -> None:
    """Add what the recipe needs: packages, GPUs, storage, and what a run would refuse."""
    before = len(found.missing)
    found.missing += [f"{text}: pip install 'ray_soup[{name}]'" for name, text in _packages(recipe) if not _version(name)]
    gpus = recipe.actors.gpus
    if gpus and not torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS"):
        found.missing.append(
            f"actors.gpus is {gpus:g}, and torch finds no GPU here. Set it to 0, or set RAY_ADDRESS to a cluster."
        )
    _add_storage(recipe, found)
    if len(found.missing) > before:
        return
    try:
        inputs = open_inputs(recipe)
    except (SoupError, ImportError) as error:
        found.missing.append(str(error))
        return
    found.rows["recipe"] = (
        f"{len(inputs.ingredients)} ingredients of {inputs.layout.numel / 1e6:,.1f} M parameters fit {recipe.model}"
    )
    found.warnings += inputs.notes


def _packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the optional packages that a recipe needs, and why."""
    library = ModelSpec.parse(recipe.model).library
    if library in OPTIONAL:
        yield library, f"model: {recipe.model} needs {library}"
    if library == "transformers" and recipe.ingredients is not None and not _version("peft"):
        try:
            adapters = adapters_among(open_ingredients(recipe.ingredients))
        except SoupError:  # which the run's own checks report
            adapters = ()
        if adapters:
            yield "peft", f"the ingredients are LoRA adapters, such as {adapters[0].path}, and need peft"
    if recipe.search.algorithm == "optuna":
        yield "optuna", "search.algorithm: optuna needs optuna"
    for key, names in (("loggers", recipe.loggers), ("search.loggers", recipe.search.loggers)):
        yield from ((name, f"{key}: {name} needs {name}") for name in names)


def _add_storage(recipe: Recipe, found: Diagnosis) -> None:
    """Warn about remote storage for which no credentials are known: it may be public, or the machine's role may do."""
    spec = recipe.ingredients
    paths = [*([spec] if isinstance(spec, str) else spec or ()), *recipe.data.sources().values()]
    for scheme in sorted({path.partition("://")[0] for path in paths if storage.is_remote(path)}):
        names = BY_SCHEME.get(scheme, ())
        files = [file for file, of in FILES.items() if of == f"{scheme}://" and Path(file).expanduser().exists()]
        if names and not files and not any(map(os.environ.get, names)):
            found.warnings.append(
                f"The recipe reads {scheme}://, and none of {', '.join(names)} is set. If it is neither public nor open to "
                "this machine's role, set them for the driver and the actors."
            )


def as_json(found: Diagnosis) -> Mapping[str, Any]:
    """Return a diagnosis as JSON values."""
    return {
        **{name.strip(): text for name, text in found.rows.items()},
        "missing": found.missing,
        "warnings": found.warnings,
    }
