"""A network, exported, folded, and compiled ahead of time by AOTInductor into a file of its own.

Needs a C++ compiler, as AOTInductor does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import fxfuse
from fxfuse import zoo

model = zoo.load("torchvision:mobilenet_v3_small", seed=0).model
x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})

folded = fxfuse.fuse(program)
print(fxfuse.report(folded).summary)
with tempfile.TemporaryDirectory() as folder:
    package = torch._inductor.aoti_compile_and_package(folded, package_path=str(Path(folder) / "net.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        for images in (x, torch.randn(5, 3, 96, 96)):
            same = torch.allclose(model(images), compiled(images), rtol=1e-3, atol=1e-4)
            print("batch", len(images), "is the same:", same)
