"""Build the model that a recipe names."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch

from ray_soup.blocks import Layout, layout_of
from ray_soup.checkpoints import open_ingredient
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.preprocess import Named, Preprocess, identity
from ray_soup.recipe import is_function


@dataclass(frozen=True)
class Built:
    """A model that maps a batch of inputs to logits [n, classes], and what makes its input of an image or a text."""

    model: torch.nn.Module
    preprocess: Preprocess | None = None


class ImageClassifier(torch.nn.Module):
    """The image tower of an open_clip model and a linear head on its features, which are scaled to unit length first where
    `normalize` says so."""

    def __init__(self, visual: torch.nn.Module, features: int, classes: int, normalize: bool = False):
        super().__init__()
        self.visual = visual
        self.head = torch.nn.Linear(features, classes)
        self.normalize = normalize

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.visual(images)
        return self.head(torch.nn.functional.normalize(features, dim=-1) if self.normalize else features)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"


def look_in(folder: str) -> None:
    """Find `module:function` in this folder too: a worker's current folder need not be its driver's."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def import_function(spec: str) -> Callable[..., Any]:
    """`package.module:function`, looked for in the current folder too. Raises RecipeError."""
    module_name, _, name = spec.partition(":")
    look_in(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise RecipeError(
            f"{spec}: the module {module_name} cannot be imported ({error}). It must lie in the current folder, the "
            "working directory of the job, or be installed."
        ) from error
    except AttributeError:
        raise RecipeError(f"{spec}: the module {module_name} has no '{name}'.") from None


def build(spec: str) -> Built:
    """The model that `spec` names, its numbers yet to be filled in. Raises RecipeError."""
    library, _, rest = spec.partition(":")
    if library in LIBRARIES:
        name, _, query = rest.partition("?")
        return LIBRARIES[library](name, dict(parse_qsl(query, keep_blank_values=True)), spec)
    if is_function(spec):
        made = import_function(spec)()
        if isinstance(made, torch.nn.Module):
            return Built(made)
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module):
            return Built(*made)
        raise RecipeError(f"{spec} returned {type(made).__name__}; expected a model, or a model and its preprocessing.")
    raise RecipeError(
        f"model: {spec!r} found; expected open_clip:, timm: or torchvision:NAME?classes=N, transformers:FOLDER, or "
        "package.module:function."
    )


def _library(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"model: {spec} takes the library {name}, which cannot be imported ({error}). pip install 'ray_soup[{name}]'"
        ) from error


def _options(options: dict[str, str], spec: str, known: Iterable[str], example: str) -> None:
    """Raises RecipeError for an option that is not among the known ones."""
    wrong = sorted(set(options) - set(known))
    if wrong:
        raise RecipeError(f"model: {spec!r} has the option {wrong[0]}; known are {', '.join(known)}, as in {example}.")


def _number(options: dict[str, str], name: str, spec: str, example: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", options.get(name, "")):
        raise RecipeError(f"model: {spec!r} found; expected a number of {name}, as in {example}.")
    return int(options[name])


def _unknown(library: str, name: str, names: list[str]) -> RecipeError:
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {len(names)} others, such as {', '.join(names[:3])}."
    return RecipeError(f"model: {library} has no '{name}'; {hint}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that no pretrained weights were loaded: the ingredients bring theirs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _open_clip(name: str, options: dict[str, str], spec: str) -> Built:
    import open_clip

    example = f"open_clip:{name}?classes=1000"
    _options(options, spec, ("classes", "normalize", "zeroshot", "template"), example)
    config = open_clip.get_model_config(name)
    if config is None:
        raise _unknown("open_clip", name, open_clip.list_models())
    with _quiet():
        clip = open_clip.create_model(name, pretrained=None)
    visual = clip.visual
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    preprocess = open_clip.image_transform(visual.image_size, is_train=False, mean=mean, std=std)
    if "zeroshot" in options:
        return Built(_zero_shot(clip, name, options, spec), preprocess)
    classes = _number(options, "classes", spec, example)
    normalize = options.get("normalize", "false")
    if normalize not in ("true", "false"):
        raise RecipeError(f"model: {spec!r} found; expected normalize=true or normalize=false.")
    return Built(ImageClassifier(visual, config["embed_dim"], classes, normalize == "true"), preprocess)


def _zero_shot(clip: torch.nn.Module, name: str, options: dict[str, str], spec: str) -> torch.nn.Module:
    """A whole CLIP, by its own names, that gives the logits of its text tower's classes: for each line of a file the mean of
    its features over the templates. logits = scale * image_features @ class_features.T"""
    templates = options.get("template", TEMPLATE).split("|")
    prompts, tokens = _prompts(name, options["zeroshot"], templates, f"model: {spec}")
    classes = len(prompts) // len(templates)

    def with_prompts(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs[0], tokens.to(inputs[0].device)

    def logits(module: torch.nn.Module, inputs: Any, output: Any) -> torch.Tensor:
        images, texts, scale = output[:3]
        return scale * images @ _class_features(texts, classes).T

    clip.register_forward_pre_hook(with_prompts)
    clip.register_forward_hook(logits)
    clip.prompts = tuple(prompts)  # for the fingerprint
    return clip


TEMPLATE = "a photo of a {}."


def _prompts(name: str, file: str, templates: Sequence[str], key: str) -> tuple[list[str], torch.Tensor]:
    """For each class name of a file one prompt a template, as text and as tokens. Raises RecipeError."""
    import open_clip

    try:
        classes = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{key}: the class names in {file} cannot be read ({error}).") from error
    if len(classes) < 2 or not templates or any("{}" not in t for t in templates):
        raise RecipeError(
            f"{key}: expected two class names or more, one a line (found {len(classes)}), and templates with {{}} in them."
        )
    prompts = [template.replace("{}", c) for c in classes for template in templates]
    try:
        return prompts, open_clip.get_tokenizer(name)(prompts)
    except Exception as error:  # a tokenizer of transformers that is not there
        raise RecipeError(f"{key}: the tokenizer of open_clip's {name} cannot be had ({error}).") from error


def _class_features(texts: torch.Tensor, classes: int) -> torch.Tensor:
    """Means over the templates, of unit length: [classes, features]. texts: features of the prompts."""
    return torch.nn.functional.normalize(texts.unflatten(0, (classes, -1)).mean(dim=1), dim=-1)


def fill_zero_shot(head: torch.nn.Linear, spec: str, source: str, file: str, templates: Sequence[str]) -> None:
    """Make a head on image features of unit length out of class names, with the text tower and the scale of logits of the
    CLIP in `source`, as in `load_pretrained` (Radford et al. 2021). Raises RecipeError."""
    import open_clip

    library, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if library != "open_clip" or dict(parse_qsl(query)).get("normalize") != "true":
        raise RecipeError(
            f"finetune.class_names: a head of class names takes image features of unit length; the model is {spec}. Write "
            "open_clip:NAME?classes=N&normalize=true."
        )
    prompts, tokens = _prompts(name, file, templates, "finetune.class_names")
    classes = len(prompts) // len(templates)
    if classes != head.out_features:
        raise RecipeError(f"finetune.class_names: {file} names {classes} classes; the model {spec} has {head.out_features}.")
    tag = source.removeprefix("open_clip:") if source.startswith("open_clip:") else None
    with _quiet():
        clip = open_clip.create_model(name, pretrained=tag).eval()
    if tag is None:
        load_checkpoint(clip, source)
    with torch.inference_mode():
        texts = torch.cat([clip.encode_text(some, normalize=True) for some in tokens.split(256)])
        head.weight.copy_(clip.logit_scale.exp() * _class_features(texts, classes))
        head.bias.zero_()


def _timm(name: str, options: dict[str, str], spec: str) -> Built:
    timm = _library("timm", spec)
    example = f"timm:{name}?classes=1000"
    _options(options, spec, ("classes",), example)
    classes = _number(options, "classes", spec, example)
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    try:
        with _quiet():
            model = timm.create_model(name, pretrained=False, num_classes=classes)
    except RuntimeError as error:
        raise RecipeError(f"model: timm cannot make '{name}' ({error}).") from error
    return Built(model, timm.data.create_transform(**timm.data.resolve_model_data_config(model)))


def _torchvision(name: str, options: dict[str, str], spec: str) -> Built:
    tv = _library("torchvision", spec).models
    example = f"torchvision:{name}?classes=1000"
    _options(options, spec, ("classes",), example)
    classes = _number(options, "classes", spec, example)
    names = tv.list_models(module=tv)  # classifiers of images
    if name not in names:
        raise _unknown("torchvision", name, names)
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}  # or it warns
    model = tv.get_model(name, weights=None, num_classes=classes, **extra)
    return Built(model, tv.get_model_weights(name).DEFAULT.transforms())


def _transformers(name: str, options: dict[str, str], spec: str) -> Built:
    transformers = _library("transformers", spec)
    _options(options, spec, ("classes", "length"), "transformers:FOLDER?classes=10")
    local = {"local_files_only": True} if os.path.exists(name) else {}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **local)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model: {name} has no config.json that transformers can read ({error}).") from error
    if "classes" in options:
        config.num_labels = _number(options, "classes", spec, f"transformers:{name}?classes=10")
    kind = _task_of(config, spec)
    with _quiet():
        model = getattr(transformers, f"AutoModel{kind}").from_config(config, dtype=torch.float32)
    model.names_in_files = _names_in_files(model)
    model.register_forward_hook(lambda module, inputs, output: output.logits)
    if kind == "ForImageClassification":
        model.register_forward_pre_hook(
            lambda module, inputs, named: ((), {module.main_input_name: inputs[0]}), with_kwargs=True
        )
        return Built(model, _image_processor(name, local))
    model.register_forward_pre_hook(
        lambda module, inputs, named: ((), {"input_ids": inputs[0][:, 0], "attention_mask": inputs[0][:, 1]}),
        with_kwargs=True,
    )
    most = getattr(config, "max_position_embeddings", None) or 1 << 30
    options = {"length": str(min(128, most)), **options}
    length = _number(options, "length", spec, f"transformers:{name}?length=128")
    if length > most:
        raise RecipeError(f"model: {spec}: length is {length} and the model takes {most} tokens at most.")
    return Built(model, _tokenizer(name, local, length))


def _names_in_files(model: torch.nn.Module) -> dict[str, str]:
    """The names that transformers gives tensors in its files, where they are others than in the model, to those."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0 they were the same
        return {}
    state = {name: torch.empty(0) for name in model.state_dict()}
    own = {id(tensor): name for name, tensor in state.items()}
    in_files = revert_weight_conversion(model, state)
    return {n: own[id(t)] for n, t in in_files.items() if n not in state and id(t) in own}


def _task_of(config: Any, spec: str) -> str:
    """ForImageClassification or ForSequenceClassification: what the architecture is, else what the kind of model can be."""
    from transformers.models.auto import modeling_auto as auto

    kinds = {
        "ForImageClassification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "ForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    architectures = config.architectures or []
    found = [kind for kind in kinds if any(a.endswith(kind) for a in architectures)]
    found = found or [kind for kind, mapping in kinds.items() if type(config) in mapping]
    if len(found) != 1:
        raise RecipeError(
            f"model: {spec} is {', '.join(architectures) or config.model_type}; expected a model for image classification "
            "or sequence classification."
        )
    return found[0]


def _image_processor(name: str, local: dict[str, Any]) -> Preprocess | None:
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, **local)
    except (OSError, ValueError):  # none beside the model
        return None
    return Named(lambda image: processor(image, return_tensors="pt")["pixel_values"][0], repr(processor))


def _tokenizer(name: str, local: dict[str, Any], length: int) -> Preprocess | None:
    """Text -> int64 [2, length], token ids and attention mask."""
    import transformers

    if local and not _has_tokenizer(name):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **local)
    except (OSError, ValueError):
        return None
    if tokenizer.pad_token is None:
        raise RecipeError(f"model: the tokenizer of {name} has no padding token. Set its pad_token and save it again.")

    def tokens(text: str) -> torch.Tensor:
        found = tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return torch.stack([found["input_ids"][0], found["attention_mask"][0]])

    tokens("")  # from here on its settings stay as they are: threads may share it
    words = hashlib.sha256(f"{sorted(tokenizer.get_vocab().items())}".encode()).hexdigest()
    return Named(tokens, f"{length} {words} {tokenizer!r}", takes="text")


def _has_tokenizer(folder: str) -> bool:
    """transformers makes one without words where there is none."""
    return any(os.path.exists(os.path.join(folder, file)) for file in TOKENIZER_FILES)


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
LIBRARIES: dict[str, Callable[[str, dict[str, str], str], Built]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def fingerprint(spec: str, built: Built) -> str:
    """SHA-256 of the model's structure and preprocessing, and of the file that its function lies in."""
    more = [str(getattr(built.model, name, "")) for name in ("config", "prompts")]
    digest = hashlib.sha256("\n".join([spec, str(built.model), *identity(built.preprocess), *more]).encode())
    if is_function(spec):
        with contextlib.suppress(OSError, TypeError):
            digest.update(inspect.getsource(sys.modules[spec.partition(":")[0]]).encode())
    return digest.hexdigest()


def load_checkpoint(model: torch.nn.Module, path: str) -> None:
    """Fill in the numbers of `model`, in place, from the checkpoint at `path`. Raises IngredientError if it does not fit."""
    layout = layout_of(model)
    checkpoint = open_ingredient(path)
    if not checkpoint.match(layout.state_shapes, layout.tied):
        missing = sorted(set(layout.state_shapes) - set(checkpoint.tensors))[:3]
        more = sorted(set(checkpoint.tensors) - set(layout.state_shapes))[:3]
        raise IngredientError(f"{path} does not fit the model: it lacks {missing}, and the model has no {more}.")
    state = model.state_dict()
    with torch.no_grad():
        for name, shape in layout.state_shapes.items():
            state[name].copy_(checkpoint.read(name).view(shape))


def load_pretrained(model: torch.nn.Module, spec: str, source: str) -> torch.nn.Linear:
    """Fill in the numbers of `model`, in place, from a checkpoint that lacks its last linear layer, or whose layer has
    other classes; returns that layer. `source`: a file, or `open_clip:TAG` for weights that open_clip knows by name. What
    else is in the checkpoint (a text tower) is left. Raises RecipeError where more than one linear layer would be new."""
    state = model.state_dict()
    if source.startswith("open_clip:") and spec.startswith("open_clip:"):
        import open_clip

        name = spec.removeprefix("open_clip:").partition("?")[0]
        clip = open_clip.create_model(name, pretrained=source.removeprefix("open_clip:"))
        given = {f"visual.{key}": value for key, value in clip.visual.state_dict().items()}
    else:
        checkpoint = open_ingredient(source)
        second = layout_of(model).tied
        checkpoint.match(state, second)
        base = f"{getattr(model, 'base_model_prefix', '')}."  # transformers' name for what is below the head
        given = {}
        for name, info in checkpoint.tensors.items():
            own = name if name in state else second.get(base + name, base + name)
            if own in state:
                given[own] = checkpoint.read(name).view(info.shape)
    new = [name for name, tensor in state.items() if name not in given or given[name].shape != tensor.shape]
    layers = sorted({name.rpartition(".")[0] for name in new})
    head = dict(model.named_modules()).get(layers[0]) if len(layers) == 1 else None
    if not isinstance(head, torch.nn.Linear):
        raise RecipeError(
            f"finetune.pretrained: {source} should hold all of the model {spec} but one linear layer, its head; it "
            + (f"lacks {len(new)} tensors: {', '.join(new[:4])}." if new else "lacks none: name it as finetune.init.")
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in new:
                tensor.copy_(given[name])
    return head


def write_companions(spec: str, folder: Path, dtype: torch.dtype) -> None:
    """What the model's library wants beside its weights, of this dtype: for transformers config.json, and the files of the
    tokenizer or image processor."""
    if not spec.startswith("transformers:"):
        return
    import transformers

    name = spec.removeprefix("transformers:").partition("?")[0]
    local = {"local_files_only": True} if os.path.exists(name) else {}
    with torch.device("meta"):
        model = build(spec).model
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.save_pretrained(folder)
    if model.main_input_name == "input_ids":
        if not local or _has_tokenizer(name):
            transformers.AutoTokenizer.from_pretrained(name, **local).save_pretrained(folder)
    else:
        with contextlib.suppress(OSError, ValueError):  # none beside the model
            transformers.AutoImageProcessor.from_pretrained(name, **local).save_pretrained(folder)


def loading_line(spec: str, files: Iterable[str]) -> str:
    """The line of Python that loads a soup of this model, from its folder, which holds these files, with the library that
    the model came from."""
    library, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    options, sharded = dict(parse_qsl(query)), any(f.endswith(".index.json") for f in files)
    ours = f"ray_soup.models.loaded({spec!r}, '.')"
    if library == "transformers":
        with torch.device("meta"):
            return f"transformers.{type(build(spec).model).__name__}.from_pretrained('.')"
    if sharded or library not in LIBRARIES or (library == "open_clip" and "zeroshot" not in options):
        return ours
    file = "model.safetensors"
    return {
        "open_clip": f"open_clip.create_model({name!r}, pretrained={file!r})",
        "timm": f"timm.create_model({name!r}, num_classes={options.get('classes')}, checkpoint_path={file!r})",
        "torchvision": (
            f"(model := torchvision.models.get_model({name!r}, num_classes={options.get('classes')})).load_state_dict("
            f"safetensors.torch.load_file({file!r}))"
        ),
    }[library]


def loaded(spec: str, path: str) -> torch.nn.Module:
    """The model that `spec` names, with the numbers of the checkpoint at `path`, in eval mode. Raises RecipeError and
    IngredientError."""
    model = build(spec).model
    load_checkpoint(model, path)
    return model.eval()


def describe(spec: str) -> Layout:
    """The layout of the model that `spec` names, without its numbers where the model can be built so."""
    try:
        with torch.device("meta"):
            return layout_of(build(spec).model)
    except RecipeError:
        raise
    except Exception:  # some models need real numbers to be built
        return layout_of(build(spec).model)
