"""A ResNet of Hugging Face's transformers, folded inside: it stays a ``ResNetForImageClassification``.

Needs transformers (``pip install transformers``). The weights are random here; with ``from_pretrained`` they
are those of a hub.
"""

from __future__ import annotations

import torch
from torch import nn

import fxfuse
from fxfuse import zoo

zoo.torchvision()  # which transformers imports, and which need not fit this torch
from transformers import ResNetConfig, ResNetForImageClassification  # noqa: E402

torch.manual_seed(0)
model = ResNetForImageClassification(ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2]))
x = torch.randn(2, 3, 64, 64)
for _ in range(3):
    model(x)  # in training mode, so that the norms get statistics of their own
model.eval()

fused = fxfuse.fuse(model, keep_modules=True)
print(fxfuse.report(fused).summary)
print("still a", type(fused).__name__)
print("norms left:", sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()))
with torch.no_grad():
    expected, found = model(pixel_values=x).logits, fused(pixel_values=x).logits
print("the same logits:", torch.allclose(expected, found, rtol=1e-4, atol=1e-5))
