"""What a model of transformers is trained for, by its config."""

from __future__ import annotations

from typing import Any

from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.transformers_models import load_config, task_of

TOKEN_TASKS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForTokenClassification": "token_classification",
}
"""Objectives by the end of the name of an architecture."""
AUTO = {"causal_lm": "ForCausalLM", "masked_lm": "ForMaskedLM", "token_classification": "ForTokenClassification"}
"""The ends of the names of the AutoModel classes of transformers, by objective."""


def token_objective(config: Any) -> str:
    """Return the objective of a model that has outputs for each token; empty for other models."""
    return next((TOKEN_TASKS[end] for end in TOKEN_TASKS if any(a.endswith(end) for a in config.architectures or ())), "")


def auto_task(config: Any, spec: ModelSpec) -> str:
    """Return the end of the name of the AutoModel class that builds the model of a config. Raises RecipeError."""
    of_tokens = token_objective(config)
    return AUTO[of_tokens] if of_tokens else task_of(config, spec)


def transformers_objective(spec: ModelSpec) -> str:
    """Return the objective that a config names, by the rule by which transformers chooses its loss.

    Raises RecipeError if the model does not exist or cannot be used.
    """
    config = load_config(spec.import_library(), spec)
    of_tokens = token_objective(config)
    if of_tokens:
        return of_tokens
    task = task_of(config, spec)
    if task == "ForSequenceClassification" and (config.problem_type == "regression" or config.num_labels == 1):
        return "regression"
    return "multi_label" if config.problem_type == "multi_label_classification" else "classification"
