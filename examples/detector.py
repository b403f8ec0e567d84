"""A detector of torchvision, whose backbone is folded in place; the rest of it stays what it is.

A detector as a whole cannot be traced: how many boxes it finds decides what it does next. Its norms are all
in the backbone, and that can. ``keep_modules=True`` gives a backbone of the same class, so that whoever looks
into the detector finds what was there. The weights are random; with ``weights="DEFAULT"`` they are COCO's.
"""

from __future__ import annotations

import torch
from torch import nn

import fxfuse
from fxfuse import zoo

detection = zoo.torchvision().models.detection
detector = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).eval()
generator = torch.Generator().manual_seed(0)
for module in detector.modules():
    if hasattr(module, "running_var"):
        module.running_mean.normal_(generator=generator)
        module.running_var.uniform_(0.5, 2, generator=generator)

x = torch.randn(1, 3, 128, 128, generator=generator)
with torch.no_grad():
    before = detector.backbone(x)
detector.backbone = fxfuse.fuse(detector.backbone, keep_modules=True)
with torch.no_grad():
    after = detector.backbone(x)

report = fxfuse.report(detector.backbone)
print(report.summary)
print("backbone is still a", type(detector.backbone).__name__)
print("norms left:", sum(isinstance(module, nn.BatchNorm2d) for module in detector.modules()))
for level in before:
    distance = (before[level] - after[level]).norm() / before[level].norm()
    assert distance < 1e-4, distance
print("all levels are the same:", *before)
