"""Models by name."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import zoo
from fxfuse.comparison import _is_initial


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_random_weights_come_with_random_statistics(name):
    loaded = zoo.load(name)
    assert loaded.weights == zoo.RANDOM
    assert not any(_is_initial(m) for m in loaded.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not loaded.model.training


def test_the_seed_fixes_weights_and_inputs():
    first, second, third = (zoo.load("torchvision:resnet18", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.inputs[0], second.inputs[0])
    assert torch.equal(first.model.conv1.weight, second.model.conv1.weight)
    assert not torch.equal(first.model.conv1.weight, third.model.conv1.weight)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("torchvision:inception_v3", (1, 3, 299, 299)),
        ("torchvision:r3d_18", (1, 3, 16, 112, 112)),
        ("timm:tf_efficientnet_lite1", (1, 3, 240, 240)),
    ],
)
def test_inputs_have_the_size_that_the_library_states(name, shape):
    with torch.device("meta"):
        assert tuple(zoo.load(name).inputs[0].shape) == shape


def test_weights_in_the_local_cache_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    models = zoo.torchvision().models
    weights = models.ResNet18_Weights.DEFAULT
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    tensors = zoo.load("torchvision:resnet18", seed=7).model.state_dict()
    torch.save(tensors, file)
    loaded = zoo.load("torchvision:resnet18")
    assert "pretrained" in loaded.weights
    assert torch.equal(loaded.model.bn1.running_var, tensors["bn1.running_var"])


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("torchvision:resnet50", 53),
        ("torchvision:mobilenet_v2", 52),
        ("torchvision:inception_v3", 94),
        ("timm:efficientnet_b0", 49),
        ("timm:regnety_002", 44),
        ("timm:tf_efficientnet_lite0", 49),
    ],
)
def test_every_norm_of_these_networks_is_folded_and_the_result_verifies(name, norms):
    loaded = zoo.load(name)
    size = 299 if "inception" in name else 64
    fused = fxfuse.fuse(loaded.model, example_inputs=(torch.randn(1, 3, size, size),))
    report = fxfuse.report(fused)
    assert (report.norms, len(report.folded), report.refused) == (norms, norms, ())
    assert report.verification.ok and report.verification.conclusive
    assert not any(zoo_norm for zoo_norm in fused.modules() if isinstance(zoo_norm, nn.BatchNorm2d))
