"""A sample of ``benchmarks.reach``: real architectures that together need every kind of move.

The counts are what the architectures have to fold; the numbers are compared in float64.
"""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

import fxfuse
from fxfuse import zoo
from tests.support import assert_exact

# model, norms, folded of these, folded forward of these, what is left.
COUNTS = [
    ("timm:levit_128s", 52, 52, 2, {}),  # linear → flatten(0, 1) → norm → reshape_as
    ("timm:mixnet_s", 49, 49, 0, {}),  # several convolutions → concat → norm
    ("timm:inception_resnet_v2", 204, 204, 0, {}),  # and 40 scaled residual branches
    ("timm:nextvit_small", 61, 61, 28, {}),  # norm → convolution without padding, pooling between
    ("timm:coatnet_bn_0_rw_224", 35, 25, 19, {"FXF101": 5, "FXF102": 5}),
    ("timm:xcit_nano_12_p8_224", 15, 3, 0, {"FXF305": 12}),  # norm → convolution that pads with zeros
    ("timm:densenet121", 121, 59, 0, {"FXF101": 62}),  # concat → norm → ReLU, the parts read elsewhere
    ("timm:resnetv2_18", 17, 8, 0, {"FXF101": 9}),  # add → norm → ReLU
    ("timm:repvgg_a1", 61, 61, 0, {}),  # branches, of which one is an identity
    ("timm:efficientvit_m0", 113, 113, 1, {}),  # control flow in a submodule
    ("timm:mobilevit_s", 32, 32, 0, {}),
    ("torchvision:shufflenet_v2_x0_5", 56, 56, 0, {}),
    ("torchvision:fasterrcnn_resnet50_fpn", 53, 53, 0, {}),  # control flow and options in the model itself
    ("torchvision:raft_large", 15, 15, 0, {}),
]


def on_meta(spec):
    source, _, name = spec.partition(":")
    library = zoo.timm() if source == "timm" else zoo.torchvision().models
    with torch.device("meta"):
        if source == "timm":
            return library.create_model(name).eval()
        options = {"weights_backbone": None} if "rcnn" in name else {}
        return library.get_model(name, weights=None, **options).eval()


@pytest.mark.parametrize(("spec", "norms", "folded", "forward", "left"), COUNTS, ids=str)
def test_every_norm_of_an_architecture_is_folded_or_left_for_a_reason(spec, norms, folded, forward, left):
    report = fxfuse.explain(on_meta(spec))
    directions = Counter(fold.direction for fold in report.folded)
    assert (report.norms, len(report.folded), directions["forward"]) == (norms, folded, forward), report
    assert Counter(refusal.code for refusal in report.refused) == left
    assert all(refusal.hint for refusal in report.refused)


@pytest.mark.parametrize("keep_modules", [False, True])
@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("timm:levit_128s", 224),
        ("timm:mixnet_s", 64),
        ("timm:coatnet_bn_0_rw_224", 224),
        ("timm:efficientvit_m0", 224),
        ("timm:mobilevit_xxs", 96),
        ("timm:mobileone_s0", 64),
        ("torchvision:shufflenet_v2_x0_5", 64),
        ("timm:test_convnext", 64),
    ],
)
def test_numbers_of_an_architecture_are_exact_for_any_batch_size(spec, size, keep_modules):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        model = zoo.load(spec).model.double()
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x)
            assert float(expected.std()) > 0
            assert_exact(expected, fused(x))
