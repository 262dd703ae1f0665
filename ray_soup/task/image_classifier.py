"""An image tower as a classifier."""

from __future__ import annotations

import torch


class ImageClassifier(torch.nn.Module):
    """The image tower of an open_clip model with a linear head on its features."""

    def __init__(self, visual: torch.nn.Module, features: int, classes: int, normalize: bool = False) -> None:
        super().__init__()
        self.visual = visual
        self.head = torch.nn.Linear(features, classes)
        self.normalize = normalize

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [n, 3, H, W] to logits [n, classes]; with `normalize` the features are scaled to unit length first."""
        features = self.visual(images)
        logits: torch.Tensor = self.head(torch.nn.functional.normalize(features, dim=-1) if self.normalize else features)
        return logits

    def extra_repr(self) -> str:
        """Show `normalize` in the printed model, because the fingerprint is computed from the printed model."""
        return f"normalize={self.normalize}"
