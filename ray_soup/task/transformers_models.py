"""Classifiers of the library transformers, with the preprocessing saved next to them."""

from __future__ import annotations

import importlib
import os
import re
from functools import partial
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.hugging_face import settings_folder
from ray_soup.io.lazy import torch
from ray_soup.task.model_spec import DTYPE, ModelSpec, no_weight_warnings
from ray_soup.task.preprocess import NamedPreprocess, Preprocess
from ray_soup.task.tokenizing import UNLIMITED, Tokenizing, default_length, identity_of_tokenizer, most_tokens

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip

TASK = "task"
"""The option of `model` that names another task than the config's: a model with a new head."""
FLASH = "flash_attention_2"
"""The implementation of attention that runs on GPUs only."""
ATTENTION = ("eager", "sdpa", FLASH, "flex_attention")


def transformers_classifier(spec: ModelSpec) -> tuple[torch.nn.Module, Preprocess | None]:
    """Build the classifier that a config.json describes, and load its image processor or tokenizer.

    The model maps one tensor to logits [n, classes]: pixels float32 [n, C, H, W], or for texts int64 [n, 2, length], token
    ids and attention mask. Raises RecipeError if the model does not exist or is not a classifier.
    """
    transformers = spec.import_library()
    spec.check_options(("task", "classes", "length", DTYPE, "attn_implementation"), "transformers:FOLDER?classes=10")
    config = load_config(transformers, spec)
    task = task_of(config, spec)
    model = built(spec, config, task)
    if task == "ForImageClassification":
        model.register_forward_pre_hook(_image_inputs, with_kwargs=True)
        return model, _image_preprocess(transformers, spec.name)
    model.register_forward_pre_hook(_text_inputs, with_kwargs=True)
    tokenizer = load_tokenizer(transformers, spec.name)
    if TASK in spec.options and model.config.pad_token_id is None:  # as scripts set it for a model without padding
        model.config.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return model, _text_preprocess(tokenizer, spec.name, length_of(spec, model, tokenizer))


def built(spec: ModelSpec, config: Any, task: str) -> Any:
    """Build the model of a config, as its options `dtype` and `attn_implementation` say.

    Raises RecipeError if that is not possible.
    """
    _check_dtype(spec)
    attention = spec.choice("attn_implementation", ATTENTION)
    if attention == FLASH and torch.empty(0).is_meta:
        attention = None  # a model without memory is described only, perhaps on a machine without a GPU
    more: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if spec.in_bfloat16:
        more[dtype_name(spec.import_library())] = torch.bfloat16
    try:
        with no_weight_warnings():
            model = model_of(spec.import_library(), config, task, **more)
    except (ValueError, ImportError) as error:
        cure = "Choose another model" if attention is None else "Change the option attn_implementation"
        raise RecipeError(
            f"model: transformers cannot build {spec.text} ({str(error).partition(chr(10))[0]}). {cure}."
        ) from error
    if spec.in_bfloat16:
        _widen(model)
    describe_files(model)
    return model


def _check_dtype(spec: ModelSpec) -> None:
    """Check the option `dtype`. Raises RecipeError."""
    if spec.options.get(DTYPE) == "float16":
        raise RecipeError(
            f"model: found {spec.text!r}; expected float32 or bfloat16 for the option '{DTYPE}'. In float16, small "
            "gradients become 0 and large activations infinite. Use bfloat16; ingredients in float16 can be used with it."
        )
    spec.choice(DTYPE, ("float32", "bfloat16"))


def _widen(model: Any) -> None:
    """Convert those tensors of a model in bfloat16 to float32 that the library's own loader keeps so, such as routers."""
    kept = "|".join(pattern.replace("*", ".*") for pattern in getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if kept and re.search(kept, name) and tensor.is_floating_point():
            tensor.data = tensor.data.float()


def length_of(spec: ModelSpec, model: Any, tokenizer: Any, most: int = UNLIMITED, least: int = 1) -> int:
    """Return the most tokens of an example: the option `length`, otherwise what model and tokenizer take.

    Args:
        spec: the recipe key `model`.
        model: the model, whose limit holds.
        tokenizer: its tokenizer; None if it has none.
        most: upper limit of the default.
        least: lower limit of the length.

    Raises RecipeError if the model does not take that many.
    """
    limit = most_tokens(model)
    length = spec.count(
        "length", f"transformers:{spec.name}?length=128", default=min(most, default_length(model, tokenizer))
    )
    if length > limit:
        raise RecipeError(
            f"model: {spec.text}: length is {length}; the model takes at most {limit} tokens. Choose a smaller length."
        )
    if length < least:
        raise RecipeError(
            f"model: {spec.text}: length is {length}; a token is predicted from those before it. Choose a larger length."
        )
    return length


def model_of(transformers: Any, config: Any, task: str, **options: Any) -> Any:
    """Create the model of a config, with random parameters, in float32 unless the options say otherwise."""
    dtype = {dtype_name(transformers): torch.float32}
    return getattr(transformers, f"AutoModel{task}").from_config(config, **{**dtype, **options})


def dtype_name(transformers: Any) -> str:
    """Return the name of the attribute of a config, and of the argument, for the dtype: it changed in 4.56."""
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"


def untie(config: Any) -> None:
    """State in the config of a model of transformers that it does not tie its embeddings."""
    for one in (config, config.get_text_config()):
        if getattr(one, "tie_word_embeddings", None) is not None:
            one.tie_word_embeddings = False


def loading_options(name: str) -> dict[str, bool]:
    """Return the arguments of `from_pretrained` that keep it off the network if `name` is a folder on this machine.

    Code that a folder or model brings along is never run, and nobody is asked whether to run it.
    """
    return {"trust_remote_code": False, **({"local_files_only": True} if os.path.exists(name) else {})}


def has_tokenizer(name: str) -> bool:
    """Return whether a tokenizer can be loaded: always True for a name on the Hub.

    The check is needed because transformers makes a tokenizer without a vocabulary for a folder that has none.
    """
    return not os.path.exists(name) or any(os.path.exists(os.path.join(name, file)) for file in TOKENIZER_FILES)


def _image_inputs(model: Any, inputs: tuple[torch.Tensor], named: Any) -> tuple[tuple[()], dict[str, torch.Tensor]]:
    pixels = inputs[0].to(model.dtype) if inputs[0].is_floating_point() else inputs[0]
    return (), {model.main_input_name: pixels}


def _text_inputs(model: Any, inputs: tuple[torch.Tensor], named: Any) -> tuple[tuple[()], dict[str, torch.Tensor]]:
    return (), {"input_ids": inputs[0][:, 0], "attention_mask": inputs[0][:, 1]}


def load_config(transformers: Any, spec: ModelSpec) -> Any:
    """Load the config of the model, with the number of classes of the recipe. Raises RecipeError."""
    folder = settings_folder(spec.name)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **loading_options(folder))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model: {spec.name} has no config.json that transformers can read ({error}). Use a folder that "
            "`save_pretrained` wrote, or a model on the Hub."
        ) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise RecipeError(
            f"model: the config.json of {spec.name} is that of a quantized model (quantization_config, {method}); expected "
            "a model with floating-point weights. Use the model from before quantization, or, if its weights have been "
            "dequantized, remove that entry."
        )
    chosen = spec.choice(TASK, ("classification", "token_classification"))
    if chosen is not None:
        config.architectures = [_architecture_for(chosen, config, spec)]
    if "classes" in spec.options:
        config.num_labels = spec.count("classes", f"transformers:{spec.name}?classes=10")
    return config


def _architecture_for(chosen: str, config: Any, spec: ModelSpec) -> str:
    """Return the architecture by which a model of this config does another task than its own. Raises RecipeError."""
    from transformers.models.auto import modeling_auto as auto

    mappings = {
        "classification": (
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        ),
        "token_classification": (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,),
    }  # fmt: skip
    found: Any = next((mapping[type(config)] for mapping in mappings[chosen] if type(config) in mapping), None)
    if found is None:
        raise RecipeError(
            f"model: {spec.text}: transformers has no {config.model_type} for {chosen}. Choose another task or model."
        )
    first: type[Any] = found[0] if isinstance(found, tuple) else found
    return first.__name__


def task_of(config: Any, spec: ModelSpec) -> str:
    """Return ForImageClassification or ForSequenceClassification.

    The architectures in the config decide; if there are none, the tasks that the model type supports.
    """
    from transformers.models.auto import modeling_auto as auto

    tasks = {
        "ForImageClassification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "ForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    architectures = config.architectures or []
    found = [task for task in tasks if any(a.endswith(task) for a in architectures)]
    found = found or [task for task, mapping in tasks.items() if type(config) in mapping]
    if len(found) != 1:
        raise RecipeError(
            f"model: {spec.text} is {', '.join(architectures) or config.model_type}; expected a model for image "
            "classification or sequence classification. Choose another model."
        )
    return found[0]


def describe_files(model: Any) -> None:
    """Note on a model by which other names its files may have tensors, and which tensors in them it does not need."""
    model.names_in_files = _names_in_files(model)
    model.old_names = _old_names(model)
    model.constants_in_files = _constants(model)


def _names_in_files(model: Any) -> dict[str, str]:
    """Map the names that tensors have only in the files of transformers to their names in the model."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before 5.0, both names were the same
        return {}
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    own = {id(tensor): name for name, tensor in state.items()}
    in_files = revert_weight_conversion(model, state)
    return {n: own[id(t)] for n, t in in_files.items() if n not in state and id(t) in own}


def _old_names(model: Any) -> dict[str, str]:
    """Map old names of tensors, such as LayerNorm.gamma, to their names in the model, as the library's own loader does."""
    state = model.state_dict()
    try:
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        loading: Any = importlib.import_module("transformers.core_model_loading")
        renamings = mapping.get_checkpoint_conversion_mapping("legacy")
        candidates = [
            (old, name)
            for renaming in (r.reverse_transform() for r in renamings)
            for name in state
            if (old := renaming.rename_source_key(name)[0]) not in state and loading.apply_renamings(old, renamings) == name
        ]
        return dict(candidates)
    except (ImportError, AttributeError, TypeError):  # before 5.0, the loader's rules are inside a function
        old_parts = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        ends = [(name, new, old) for name in state for new, old in old_parts.items() if name.endswith(new)]
        return {name.removesuffix(new) + old: name for name, new, old in ends}


def _constants(model: Any) -> tuple[str, ...]:
    """Return the expressions by which the library's loader finds tensors that the model computes itself.

    Each submodel of transformers has its own, with names in the files of this version and of older ones.
    """
    found = {r"\.attn\.masked_bias$"}  # of GPT-2, a constant that the loader reports and drops
    for module in model.modules():
        found.update(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
        found.add(r"rotary_emb\.inv_freq$")
    return tuple(sorted(found))


def load_image_processor(transformers: Any, name: str) -> Any:
    """Load the image processor of a folder or model; None if none was saved with it."""
    name = settings_folder(name)
    try:
        return transformers.AutoImageProcessor.from_pretrained(name, **loading_options(name))
    except (OSError, ValueError):
        return None


def load_tokenizer(transformers: Any, name: str) -> Any:
    """Load the tokenizer of a folder or model; None if none was saved with it."""
    name = settings_folder(name)
    if not has_tokenizer(name):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name, **loading_options(name))
    except (OSError, ValueError):
        return None


def pixels(processor: Any, image: Any) -> torch.Tensor:
    """Preprocess an image: pixels float32 [C, H, W]."""
    values: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    return values


def _image_preprocess(transformers: Any, name: str) -> Preprocess | None:
    processor = load_image_processor(transformers, name)
    return None if processor is None else NamedPreprocess(partial(pixels, processor), repr(processor))


def _text_preprocess(tokenizer: Any, name: str, length: int) -> Preprocess | None:
    """Return the tokenization, which maps a text to int64 [2, length], token ids and attention mask."""
    if tokenizer is None:
        return None
    tokenizer.padding_side = "right"  # outputs must not depend on the other texts of a batch
    if tokenizer.pad_token is None:
        raise RecipeError(f"model: the tokenizer of {name} has no padding token. Set its pad_token and save it again.")

    def tokens(text: str) -> torch.Tensor:
        found = tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return torch.stack([found["input_ids"][0], found["attention_mask"][0]])

    tokens("")  # the first call sets padding and truncation; afterwards threads may share the tokenizer
    text = f"{length} {identity_of_tokenizer(tokenizer)}"
    return Tokenizing(tokens, text, "text", tokenizer, length, padding=tokenizer.pad_token_id)
