"""The section `learn`: how coefficients are learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ray_soup.recipe.fields import Auto, Epochs, Examples, Section, Seed


class Learn(Section):
    """Settings for learning the coefficients."""

    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Learning rate of the unit-scaled coordinates. auto, for mehl and mehl+: a rate that fits how far the ingredients
    differ in each block, and the number of coefficients that are learned at a time; 0.01 with sgd."""
    wd: float = Field(default=0.0, ge=0, le=1e6)
    """Weight decay. It pulls the soup toward the uniform soup."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the coordinates."""
    cosine_lr: bool = False
    """Warm up linearly, then decay to zero along a cosine, over the steps of one model batch. false: a constant rate."""
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps that warm up."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Maximum norm of the gradient with respect to the coordinates; null: no clipping."""
    batch_size: Examples = 128
    """Examples per step, summed over all actors."""
    micro_batch: Examples | Auto = "auto"
    """Examples per forward pass of one actor."""
    gradient_checkpointing: bool = False
    """Save memory: the layers of the model compute their activations again in the backward pass, which takes about a third
    more time. Gradients do not change."""
    epochs: Epochs = 5
    """Passes over fit for each model batch."""
    patience: Epochs | None = None
    """End a model batch after this many epochs without a lower loss on select; null: never end early."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy on fit (Szegedy et al. 2016). The loss on select is not smoothed."""
    model_batch: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"
    """Number of ingredients whose coordinates move at a time; auto: as many as fit into memory."""
    models_epochs: int = Field(default=1, ge=1, le=10_000)
    """Passes over all ingredients, one model batch after another."""
    screen: bool = True
    """For mehl and mehl+ without `start`: begin at the mean of the best 1, 2, 4, ... ingredients on select if one of these
    is better there than the uniform soup, which broken ingredients may have spoiled."""
    smoothness: float = Field(default=0.0, ge=0, le=1e6)
    """For steps of one run: penalty on the mean square of the change of a coefficient from step to step, in units of 1/K,
    added to the loss on fit."""
    average: bool = True
    """After an epoch, evaluate on select, and keep if it is best, the mean of the coordinates after each of its steps;
    false: those after its last step, which have the noise of the last batches."""
    whiten: float = Field(default=0.5, ge=0, le=1)
    """For mehl and mehl+: how far steps are evened out. 1: in coordinates in which the directions of a block are
    orthonormal, so that a step moves the soup as far along what tells similar ingredients apart as along what they share.
    0: one coordinate for each ingredient. 0.5: half-way between these."""
    refit: bool = False
    """After learning, learn once more from the start on fit and select together, with as many steps as led to the best point
    on select. Figures on select, and all that is chosen by them, stay those of the soup before the refit."""
    seed: Seed = 1
    """Seed of the split into fit and select, of the order of batches and of the order of ingredients."""
