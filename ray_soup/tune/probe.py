"""Make a new head for a pretrained model: from class names, or fitted to its features (a linear probe)."""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.nn.functional as F

from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe
from ray_soup.task.data import Examples, load_named
from ray_soup.task.preprocess_key import build_for
from ray_soup.task.pretrained import fill_zero_shot, load_pretrained
from ray_soup.tune.train import batches_in_order, write_model


def probe(recipe: Recipe, file: str) -> Generator[tuple[int, int], None, None]:
    """Load finetune.pretrained, make the linear layer that it lacks, and write the state dict to the path or URI `file`.

    The layer is made from finetune.class_names by CLIP's text tower if the recipe names them. Otherwise it is fitted to the
    model's features of data.train: logistic regression with an L2 penalty of finetune.probe_wd, by L-BFGS. Yields
    (examples seen, total). Raises RecipeError if the layer's input is not one vector of its size per example.
    """
    options = recipe.finetune
    assert recipe.data.train is not None
    assert options.pretrained is not None
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if recipe.actors.gpus else "cpu")
    built = build_for(recipe)
    model = built.model.to(device).eval()
    head = load_pretrained(model, recipe.model, options.pretrained)
    if options.class_names is not None:
        fill_zero_shot(head, recipe.model, options.pretrained, options.class_names, options.templates)
        write_model(model, file)
        return
    examples = yield from load_named(recipe.data, "train", built.preprocess)
    features = yield from _features(model, head, examples, device)
    if features.shape != (len(examples), head.in_features):
        raise RecipeError(
            f"finetune.pretrained: the new layer's input is {list(features.shape[1:])} per example; a linear probe needs "
            f"[{head.in_features}]. Set finetune.init to a whole checkpoint instead."
        )
    fit_head(head, features, torch.from_numpy(examples.labels).to(device), options.probe_wd)
    write_model(model, file)


def _features(
    model: torch.nn.Module, head: torch.nn.Linear, examples: Examples, device: torch.device
) -> Generator[tuple[int, int], None, torch.Tensor]:
    """Collect the inputs of `head`, float32 [n, ...]. Yields (examples seen, total)."""
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().float()))
    with torch.inference_mode():
        for images, _ in batches_in_order(examples, device):
            model(images)
            yield sum(map(len, seen)), len(examples)
    hook.remove()
    return torch.cat(seen).clone()


def fit_head(head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor, wd: float) -> None:
    """Fit a linear layer by logistic regression, in place, starting from zero.

    Minimizes mean cross-entropy + wd / 2 * ||weight||^2 by L-BFGS with a strong Wolfe line search.

    Args:
        head: the layer.
        features: float32 [n, head.in_features].
        labels: int64 [n].
        wd: L2 penalty of the weight.
    """
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * wd * head.weight.square().sum()
        loss = F.cross_entropy(head(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
