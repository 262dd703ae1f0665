"""A model batch larger than the number of ingredients is noted."""

from __future__ import annotations

import pytest
import torch

import ray_soup


@pytest.mark.parametrize(("asked", "noted"), [(9, True), (3, False)])
@pytest.mark.filterwarnings("ignore:This soup is")
def test_a_model_batch_above_the_number_of_ingredients_is_noted(asked: int, noted: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    states = [{name: t + 0.1 * torch.randn_like(t) for name, t in model.state_dict().items()} for _ in range(3)]
    fit = [(torch.randn(40, 4), torch.arange(40) % 2)]
    learn = {"epochs": 1, "model_batch": asked}
    soup = ray_soup.mix_state_dicts(model, states, fit, "mehl", learn=learn, precision="float32")
    said = "learn.model_batch is 9, and there are 3 ingredients: all of them moved at a time."
    assert (said in soup.notes) == noted
