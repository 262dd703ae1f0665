"""The models of the zoos of images and texts: small enough to be fine-tuned in seconds on one core."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks.batchnorm import Digits
from tests.tiny import Tiny

LENGTH = 128
"""Bytes of a text."""
TOPICS = ("asyncio", "ctypes", "email", "idlelib", "multiprocessing", "tkinter", "unittest", "xml")
"""The packages of Python's standard library that texts are from; their numbers are the labels."""


class Perceptron(nn.Module):
    """Two layers for grayscale images, uint8 [n, 28, 28]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(28 * 28, width), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.hidden(images.flatten(1).to(self.hidden.weight.dtype) / 255)))


class Lite0(Digits):
    """EfficientNet-Lite0 for the same images, without reading its ImageNet weights."""

    def __init__(self) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        nn.Module.__init__(self)
        self.net = EfficientNet.from_name("efficientnet-lite0", num_classes=10)


class Attention(nn.Module):
    """Multi-head attention whose rows of `qkv` are queries, keys and values, head by head. [n, T, width] to the same."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """A layer of a transformer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width, num_heads)
        self.norm_2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Texts(nn.Module):
    """A transformer for texts, uint8 [n, LENGTH]: eight bytes make one of its tokens."""

    def __init__(self, width: int = 48, layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.tokens = nn.Embedding(256, 16), nn.Conv1d(16, width, 9, stride=8, padding=4)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH // 8, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(TOPICS))

    def forward(self, texts: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.tokens(self.bytes(texts.long()).transpose(1, 2))).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def perceptron() -> nn.Module:
    return Perceptron()


def wide_digits() -> nn.Module:
    return Tiny(48)


def lite0() -> nn.Module:
    return Lite0()


def texts() -> nn.Module:
    return Texts()
