"""The files that a library expects next to a soup's weights, and the lines of Python that load a soup."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ray_soup.io.distributed import METADATA
from ray_soup.io.formats import dtype_of
from ray_soup.io.hub_path import HubPath, is_hub
from ray_soup.io.hugging_face import settings_folder
from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import layout_of
from ray_soup.task.libraries import open_clip_model_arguments, timm_model_arguments, torchvision_model_arguments
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import build
from ray_soup.task.transformers_models import TASK, dtype_name, has_tokenizer, loading_options, untie

LOADING_LINES = {
    "open_clip": "import open_clip\n\nmodel = open_clip.create_model({name!r}, pretrained={file!r}{more})",
    "timm": "import timm\n\nmodel = timm.create_model({name!r}, num_classes={classes}{more}, checkpoint_path={file!r})",
    "torchvision": (
        "import torchvision\nfrom safetensors.torch import load_file\n\n"
        "model = torchvision.models.get_model({name!r}, num_classes={classes}{more})\n"
        "model.load_state_dict(load_file({file!r}))"
    ),
}
"""The lines that load one file of weights, for each library that has such lines."""
DISTRIBUTED_LINES = """\
import torch.distributed.checkpoint

model = ...  # the model as in training
torch.distributed.checkpoint.load(model.state_dict(), checkpoint_id='.')"""


def loading_lines(spec: str, files: Iterable[str]) -> str:
    """Return the lines of Python that load a soup of the model `spec` as `model`, run in the soup's folder.

    They use the model's own library if that can load the soup, otherwise ray_soup. `files` are the names of the files in
    the folder. No path of this machine is in them.
    """
    model, files = ModelSpec.parse(spec), list(files)
    if METADATA in files:
        return DISTRIBUTED_LINES
    if model.library == "transformers":
        with torch.device("meta"):
            return f"import transformers\n\nmodel = transformers.{type(build(spec).model).__name__}.from_pretrained('.')"
    sharded = any(file.endswith(".index.json") for file in files)
    with_own_head = model.library == "open_clip" and "zeroshot" not in model.options
    if sharded or with_own_head or model.library not in LOADING_LINES:
        note = ""
        if classes := model.options.get("zeroshot"):
            spec = model.with_options({"zeroshot": os.path.basename(classes)})
            note = f"# {os.path.basename(classes)}: the names of the classes, as in the recipe\n"
        return f"import ray_soup\n\n{note}model = ray_soup.load_model({spec!r}, '.')"
    lines = LOADING_LINES[model.library]
    more = "".join(f", {name}={value!r}" for name, value in _arguments(model).items())
    return lines.format(name=model.name, classes=model.options.get("classes"), file="model.safetensors", more=more)


def _arguments(model: ModelSpec) -> dict[str, Any]:
    """Return the options that the model itself depends on, as arguments of the function of its library that creates it."""
    if model.library == "timm":
        return timm_model_arguments(model)
    if model.library == "open_clip":
        return open_clip_model_arguments(model)
    return torchvision_model_arguments(model) if model.library == "torchvision" else {}


def write_companions(spec: str, folder: Path, dtype: str, tensors: Collection[str] = ()) -> None:
    """Write the files that the model's library expects next to its weights.

    For transformers: config.json, which states the `dtype` of the weights, given by torch's name, and the files of the
    tokenizer or image processor. If the weights, with names in `tensors`, contain tied tensors twice, the config does not
    tie them.
    """
    parsed = ModelSpec.parse(spec)
    if parsed.library != "transformers":
        return
    transformers = parsed.import_library()
    name = settings_folder(parsed.name)
    local = loading_options(name)
    with torch.device("meta"):
        model: Any = build(spec).model
    model.config.architectures = [type(model).__name__]
    setattr(model.config, dtype_name(transformers), dtype_of(dtype))
    if not layout_of(model).tied.keys().isdisjoint(tensors):
        untie(model.config)
    model.config._name_or_path = ""  # which versions before 5.0 would write down
    model.config.save_pretrained(folder)
    if model.main_input_name == "input_ids":
        write_tokenizer(spec, folder)
    else:
        with contextlib.suppress(OSError, ValueError):  # none was saved with the model
            transformers.AutoImageProcessor.from_pretrained(name, **local).save_pretrained(folder)


def write_tokenizer(spec: str, folder: Path) -> None:
    """Write the files of the tokenizer of `transformers:FOLDER`, if that has one."""
    parsed = ModelSpec.parse(spec)
    name = settings_folder(parsed.name)
    if has_tokenizer(name):
        tokenizers = parsed.import_library().AutoTokenizer
        tokenizers.from_pretrained(name, **loading_options(name)).save_pretrained(folder)


def adapter_lines(spec: str, base_model: str | None = None) -> str:
    """Return the lines of Python that load an adapter of the base `spec` as `model`, run in the adapter's folder.

    A base in a local folder is called `base_model`, its name on the Hub, or by the folder's name: no path of this machine is
    in the lines.
    """
    with torch.device("meta"):
        kind = type(build(spec).model).__name__
    parsed = ModelSpec.parse(spec)
    name, more, note = parsed.name, "", ""
    if is_hub(name):
        where = HubPath.parse(name)
        name, more = where.repo, f", revision={where.revision!r}"
        more += f", subfolder={where.inside!r}" if where.inside else ""
    else:
        name = base_model or os.path.basename(name.rstrip("/"))
        note = "" if base_model else f"# {name}: the folder of the base model\n"
    if TASK in parsed.options and "classes" in parsed.options:
        more += f", num_labels={parsed.options['classes']}"
    base = f"transformers.{kind}.from_pretrained({name!r}{more})"
    return f"import peft\nimport transformers\n\n{note}model = peft.PeftModel.from_pretrained({base}, '.')"
