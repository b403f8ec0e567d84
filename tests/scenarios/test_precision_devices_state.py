"""Scenarios 58-71: dtypes, devices, memory, and what one does with a folded model."""

import copy
import io
import operator
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import fxfuse
from fxfuse.capture import capture
from tests.forms import EXPORT_WARNING, FORMS, Forward, check, exported, functions, modules, noise
from tests.support import assert_exact, assert_untouched, folds, randomise, snapshot

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
X = noise(2, 3, 6, 6)
SMALL = (torch.bfloat16, torch.float16)


def pair(ins=3, outs=4, **options):
    return [nn.Conv2d(ins, outs, 3, **options), nn.BatchNorm2d(outs)]


def small_net():
    """Two norms to fold, one to leave."""
    layers = [*pair(), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), *pair(4, 4, bias=False)]
    return randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2)))


def folded_of(model):
    report = fxfuse.report(model)
    return len(report.folded), [refusal.code for refusal in report.refused]


# 58
def deep_net(seed):
    """Eight blocks with the weights of torch's initialisation and statistics as training leaves them."""
    torch.manual_seed(seed)
    blocks = [nn.Conv2d(3, 8, 1)]
    for index in range(8):
        blocks += [nn.Conv2d(8, 8, 3, padding=1, bias=index % 2 == 0), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*blocks).eval()
    with torch.no_grad():
        for norm in norms_of(model):
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.1, 1.5)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.5)
    return model


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def squared_error(model, x, truth):
    return float(((model(x).double() - truth).norm() / truth.norm()).square())


@pytest.mark.parametrize("statistics", ["same", "float32"])
@pytest.mark.parametrize("dtype", SMALL)
def test_folding_in_a_small_dtype_is_about_as_exact_as_not_folding(dtype, statistics):
    """The root mean square over some nets; the truth is the same rounded model, computed in float64."""
    unfolded = folded = 0.0
    for seed in range(6):
        model, x = deep_net(seed).to(dtype), noise(2, 3, 12, 12, seed=seed).to(dtype)
        for norm in norms_of(model) if statistics == "float32" else ():
            norm.float()
        fused = fxfuse.fuse(model)
        assert folded_of(fused) == (8, [])
        assert {parameter.dtype for parameter in fused.parameters()} == {fused(x).dtype} == {dtype}
        with torch.no_grad():
            truth = copy.deepcopy(model).double()(x.double())
            unfolded += squared_error(model, x, truth)
            folded += squared_error(fused, x, truth)
    assert 0 < folded <= 1.5**2 * unfolded


@pytest.mark.parametrize("dtype", [*SMALL, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_weight_and_bias_are_rounded_once_from_float64(form, dtype):
    model, x = randomise(nn.Sequential(*pair())).to(dtype), X.to(dtype)
    conv, norm = copy.deepcopy(model).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    bias = (conv.bias - norm.running_mean) * scale + norm.bias
    fused = fxfuse.fuse(form(model, x))
    assert folded_of(fused) == (1, [])
    found = sorted(fused.parameters(), key=torch.Tensor.numel)
    one_step = {"rtol": torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(found[-1], weight.to(dtype), **one_step)
    torch.testing.assert_close(found[0], bias.to(dtype), **one_step)


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_a_bfloat16_conv_is_kept_whatever_that_of_the_norm(norm_dtype):
    model = randomise(nn.Sequential(*pair(), nn.ReLU()))
    model[0].bfloat16()
    model[1].to(norm_dtype)
    x = X.bfloat16()
    fused = fxfuse.fuse(model, example_inputs=(x,))
    assert folded_of(fused) == (1, [])
    assert fused(x).dtype == model(x).dtype == torch.bfloat16


def test_model_that_mixes_dtypes_wrongly_goes_on_failing_or_is_left():
    """torch rejects float64 statistics behind a float32 conv; a fold must not be what makes the model run."""
    model = randomise(nn.Sequential(*pair()))
    model[0].float()
    with pytest.raises(RuntimeError, match="mixed dtype"):
        model(X.float())
    with pytest.raises(fxfuse.UsageError, match="rejects the example inputs"):
        fxfuse.fuse(model, example_inputs=(X.float(),))


# 59
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_fold_that_overflows_float16_is_left(part, form):
    model, x = randomise(nn.Sequential(*pair())).half(), X.half()
    with torch.no_grad():
        if part == "weight":
            model[1].running_var.fill_(0.0)
            model[1].weight.fill_(300.0)
        else:
            model[1].running_mean[0], model[1].weight[0] = 6e4, 60.0
    model = form(model, x)
    fused = fxfuse.fuse(model)
    assert folded_of(fused) == (0, ["FXF401"])
    assert torch.equal(model(x).nan_to_num(), fused(x).nan_to_num())


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (3, 2, 2, 2), (1, 0, 2, 1)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_weight_that_overflows_is_enough(place, sign):
    model = scaling(10.0)
    with torch.no_grad():
        model[0].weight[place] = sign * 5e4
    fused = fxfuse.fuse(model)
    assert folded_of(fused) == (0, ["FXF401"])


def test_weights_whose_sum_overflows_are_folded():
    model = scaling(0.5)
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    assert not model[0].weight.sum().isfinite()
    fused = fxfuse.fuse(model)
    assert folded_of(fused) == (1, [])
    assert torch.equal(fused.get_submodule("0").weight, torch.full((4, 3, 3, 3), 3e4).half())


def scaling(*factors):
    """A float16 conv and norms that multiply by `factors`."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(nn.BatchNorm2d(4, eps=0.0) for _ in factors)).eval()
    with torch.no_grad():
        for norm, factor in zip(model[1:], factors, strict=True):
            norm.weight.fill_(factor)
    return model.half()


@pytest.mark.parametrize(
    ("factors", "folded", "left"),
    [
        ((1e3, 1e-3), 2, []),
        ((1e-3, 1e3), 2, []),
        ((6e4, 6e4, 1e-5, 1e-4), 4, []),
        ((100.0, 6e4, 6e4), 1, ["FXF401", "FXF107"]),
        ((6e4, 6e4), 1, ["FXF401"]),
        ((1e-3, 1e-4, 1e-4), 1, ["FXF402", "FXF107"]),
    ],
)
def test_as_much_of_a_chain_is_folded_as_the_dtype_holds(factors, folded, left):
    fused = fxfuse.fuse(scaling(*factors))
    assert folded_of(fused) == (folded, left)
    assert all(bool(parameter.isfinite().all()) for parameter in fused.parameters())


@pytest.mark.parametrize("part", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_norm_with_infinite_or_undefined_values_is_left(value, part):
    model = randomise(nn.Sequential(*pair()))
    with torch.no_grad():
        getattr(model[1], part)[2] = value
    fused = fxfuse.fuse(model)
    if (part, value) == ("running_var", float("inf")):
        assert folded_of(fused) == (1, [])  # a scale of zero
    else:
        assert folded_of(fused) == (0, ["FXF401"])
    torch.testing.assert_close(fused(X), model(X), equal_nan=True)


# 60
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("operator", "memory_format"),
    [
        (nn.Conv2d(3, 4, 3), torch.channels_last),
        (nn.Conv2d(4, 4, (3, 2), groups=2), torch.channels_last),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.channels_last),
        (nn.Conv3d(3, 4, 2), torch.channels_last_3d),
        (nn.ConvTranspose3d(3, 4, 2), torch.channels_last_3d),
    ],
)
def test_weights_keep_their_memory_format(operator, memory_format, form):
    dims = 2 if memory_format is torch.channels_last else 3
    norm = (nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2](operator.out_channels)
    model = randomise(nn.Sequential(copy.deepcopy(operator), norm)).to(memory_format=memory_format)
    x = noise(2, operator.in_channels, *(4, 5, 6)[:dims]).contiguous(memory_format=memory_format)
    fused = check(form(model, x), x, folded=1)
    (weight,) = (parameter for parameter in fused.parameters() if parameter.dim() > 1)
    assert weight.is_contiguous(memory_format=memory_format) and not weight.is_contiguous()
    assert fused(x).stride() == model(x).stride()


# 61
@pytest.mark.parametrize("form", [modules, functions])
def test_graph_of_a_model_on_the_meta_device_is_folded_and_the_report_says_so(form):
    model = form(small_net().to("meta"))
    fused = fxfuse.fuse(model)
    report = fxfuse.report(fused)
    assert folded_of(fused) == (2, ["FXF102"])
    assert all(tensor.is_meta for tensor in (*fused.parameters(), *fused.buffers()))
    assert any("meta" in note and "not checked" in note for note in report.notes)
    assert fused(X.to("meta")).shape == (2, 2)


# 62
@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_are_not_folded_share_their_memory_with_the_source(form):
    model = form(small_net(), X)
    fused = check(model, X, folded=2, left=["FXF102"])
    places = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    new = [t for t in (*fused.parameters(), *fused.buffers()) if t.data_ptr() not in places]
    assert sorted(tensor.numel() for tensor in new) == [4, 4, 108, 144]  # two folded convs


def test_tensors_that_are_not_folded_stay_where_they_are_in_memory_twice_over():
    model = small_net()
    twice = fxfuse.fuse(fxfuse.fuse(model))
    assert twice.get_parameter("8.weight").data_ptr() == model[8].weight.data_ptr()


# 63
@pytest.mark.parametrize("form", [modules, functions])
@pytest.mark.parametrize("frozen", ["nothing", "all", "weight", "bias", "norm"])
def test_what_needs_a_gradient_goes_on_needing_one(frozen, form):
    model = randomise(nn.Sequential(*pair()))
    chosen = {
        "nothing": [],
        "all": list(model),
        "weight": [model[0].weight],
        "bias": [model[0].bias],
        "norm": [model[1]],
    }
    for part in chosen[frozen]:
        part.requires_grad_(False)
    before = [model[0].weight.requires_grad, model[0].bias.requires_grad]
    with torch.no_grad():
        fused = fxfuse.fuse(form(model))
    assert folded_of(fused) == (1, [])
    found = sorted(fused.parameters(), key=torch.Tensor.numel, reverse=True)
    assert [parameter.requires_grad for parameter in found] == before
    assert all(parameter.is_leaf and parameter.grad is None for parameter in found)


class Marked(nn.Parameter):
    """A parameter of a class of its own."""


@pytest.mark.parametrize("kind", [nn.Parameter, Marked])
def test_parameters_stay_parameters(kind):
    model = randomise(
        Forward(lambda m, x: m.net(x).relu() * m.scale, net=small_net(), scale=nn.Parameter(torch.ones(1)))
    )
    for module in (model.net[0], model.net[8]):
        module.weight = kind(module.weight.data)
    model.scale = kind(model.scale.data)
    found = dict(check(model, X, folded=2, left=["FXF102"]).named_parameters())
    assert found.keys() >= {"net.0.weight", "net.8.weight", "scale"}
    assert all(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("form", [modules, functions])
def test_gradients_of_the_input_are_those_of_the_source(form):
    model = form(small_net())
    fused = fxfuse.fuse(model)
    assert folded_of(fused) == (2, ["FXF102"])
    gradients = []
    for each in (model, fused):
        x = X.clone().requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    assert_exact(*gradients)


@pytest.mark.parametrize("form", [modules, functions])
@pytest.mark.parametrize("inside", [True, False])
def test_model_of_inference_tensors_is_folded(inside, form):
    with torch.inference_mode():
        model, x = form(small_net()), noise(2, 3, 6, 6)
    with torch.inference_mode(inside):
        fused = fxfuse.fuse(model, example_inputs=(x,))
    assert folded_of(fused) == (2, ["FXF102"])
    with torch.inference_mode():
        assert_exact(model(x), fused(x))


def test_model_is_folded_in_inference_mode_and_used_outside():
    model = small_net()
    with torch.inference_mode():
        fused = fxfuse.fuse(model, example_inputs=(X,))
    assert folded_of(fused) == (2, ["FXF102"])
    assert_exact(model(X).detach(), fused(X).detach())


# 64
@pytest.mark.parametrize("form", FORMS)
def test_folding_twice_changes_nothing(form):
    once = fxfuse.fuse(form(small_net(), X))
    twice = fxfuse.fuse(once)
    assert folded_of(once) == (2, ["FXF102"]) and folded_of(twice) == (0, ["FXF102"])
    assert once.code == twice.code
    first, second = once.state_dict(), twice.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("form", FORMS)
def test_folding_is_deterministic(form):
    one, other = (fxfuse.fuse(form(small_net(), X)) for _ in range(2))
    assert folded_of(one) == (2, ["FXF102"]) and fxfuse.report(one) == fxfuse.report(other)
    assert one.code == other.code and list(one.state_dict()) == list(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def counted(m, x):
    m.count.add_(1)
    return m.net(x)


def partly_training():
    model = randomise(nn.Sequential(*pair(), nn.BatchNorm2d(4)))
    model[2].train()
    return model


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (small_net, 2),
        (partly_training, 1),
        (lambda: randomise(Forward(counted, net=nn.Sequential(*pair()), count=torch.zeros(1))), 1),
    ],
)
def test_source_is_bit_identical_also_after_a_run_on_example_inputs(make, folded):
    model = make()
    before = snapshot(model)
    fused = fxfuse.fuse(model, example_inputs=(X,))
    assert folded_of(fused)[0] == folded
    assert_untouched(before, model)
    fxfuse.explain(model, example_inputs=(X,))
    assert_untouched(before, model)


def test_example_inputs_are_not_written_to():
    model = randomise(Forward(lambda m, x: m.net(x.mul_(2)), net=nn.Sequential(*pair())))
    x, original = X.clone(), X.clone()
    assert folded_of(fxfuse.fuse(model, example_inputs=(x,))) == (1, [])
    assert torch.equal(x, original)


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: operator.iadd(x, 1)])
def test_input_is_written_to_if_the_source_writes_to_it(write):
    model = randomise(Forward(lambda m, x: m.net(write(x)), net=nn.Sequential(*pair())))
    fused = check(model, X, folded=1)
    inputs = X.clone(), X.clone()
    assert_exact(model(inputs[0]), fused(inputs[1]))
    assert torch.equal(*inputs) and not torch.equal(inputs[0], X)


# 65
@pytest.mark.parametrize("form", FORMS)
def test_folded_state_dict_loads_into_a_folded_model(form):
    one, other = small_net(), randomise(small_net(), seed=1)
    folded, target = fxfuse.fuse(form(one, X)), fxfuse.fuse(form(other, X))
    assert not torch.equal(folded(X), target(X))
    target.load_state_dict(folded.state_dict())
    assert torch.equal(folded(X), target(X))


def test_folded_state_dict_does_not_load_into_the_source_and_the_error_names_the_norms():
    model = small_net()
    folded = fxfuse.fuse(model)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: .*"1\.running_mean"'):
        model.load_state_dict(folded.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: .*"1\.running_mean"'):
        folded.load_state_dict(model.state_dict())


@pytest.mark.parametrize("persistent", [True, False])
def test_buffer_is_in_the_folded_state_dict_if_it_was_in_that_of_the_source(persistent):
    model = randomise(Forward(lambda m, x: m.net(x).relu() * m.mask, net=nn.Sequential(*pair())))
    model.register_buffer("mask", noise(4, 1, 1), persistent=persistent)
    state = check(model, X, folded=1).state_dict()
    assert sorted(state) == ["mask"] * persistent + ["net.0.bias", "net.0.weight"]


# 66
@pytest.mark.parametrize("assign", [True, False])
def test_folded_model_follows_what_is_loaded_into_it(assign):
    model, other = small_net(), randomise(small_net(), seed=1)
    fused = fxfuse.fuse(model)
    fused.load_state_dict(fxfuse.fuse(other).state_dict(), assign=assign)
    assert_exact(other(X), fused(X))


def test_folded_model_follows_its_optimiser():
    fused = fxfuse.fuse(small_net())
    before = fused(X).detach()
    fused(X).sum().backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    assert not torch.allclose(before, fused(X).detach())
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_source_that_is_changed_afterwards_leaves_folded_operators_alone():
    model = randomise(nn.Sequential(*pair(), nn.ReLU()))
    fused = fxfuse.fuse(model)
    expected = fused(X).detach()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(fused(X), expected)


# 67
@pytest.mark.parametrize("form", [modules, functions])
def test_model_in_training_mode_is_a_usage_error_that_says_what_to_call(form):
    model = form(small_net()).train()
    before = snapshot(model)
    with pytest.raises(fxfuse.UsageError, match=r"training mode.*call model\.eval\(\)"):
        fxfuse.fuse(model)
    with pytest.raises(fxfuse.UsageError, match=r"call model\.eval\(\)"):
        fxfuse.explain(model)
    assert_untouched(before, model)


def branching(m, x):
    return m.net(x) if x.sum() > 0 else x


def looping(m, x):
    for row in x:
        x = m.net(row[None])
    return x


def measuring(m, x):
    return m.net(x) * float(x.max())


@pytest.mark.parametrize("forward", [branching, looping, measuring])
def test_model_that_cannot_be_traced_is_folded_inside_and_a_note_names_the_line(forward):
    model = randomise(type("Model", (nn.Module,), {"forward": forward})())
    model.net = randomise(nn.Sequential(*pair()))
    before = snapshot(model)
    message = rf"Model cannot be traced[\s\S]*in {forward.__name__}: "
    with pytest.raises(fxfuse.CaptureError, match=message):
        capture(model)
    fused = fxfuse.fuse(model)
    assert_untouched(before, model)
    assert type(fused) is type(model) and type(fused.net[1]) is nn.Identity
    assert folded_of(fused) == (1, [])
    assert re.search(message, "\n".join(fxfuse.report(fused).notes))
    for x in (X, -X, noise(1, 3, 7, 4)) if forward is not looping else (X[:1], noise(1, 3, 5, 9)):
        assert_exact(model(x).detach(), fused(x).detach())


@pytest.mark.parametrize("forward", [branching, looping, measuring])
def test_forward_that_hands_its_module_on_leaves_the_norms_as_they_are(forward):
    model = randomise(Forward(forward, net=nn.Sequential(*pair())))
    fused = fxfuse.fuse(model)
    assert folded_of(fused) == (0, ["FXF210"])
    for x in (X[:1], -X[:1]):
        assert torch.equal(model(x), fused(x))


# 68
def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = (copy.copy, copy.deepcopy, through_pickle, through_torch_save)


@pytest.mark.parametrize(
    ("form", "copied"),
    [
        (form, copied) for form in FORMS for copied in COPIES[: 2 if form is exported else 4]
    ],  # torch pickles none
)
def test_copy_of_a_folded_model_computes_the_same(form, copied):
    fused = fxfuse.fuse(form(small_net(), X))
    twin = copied(fused)
    assert folded_of(fused) == (2, ["FXF102"])
    assert torch.equal(fused(X), twin(X)) and not twin.training
    assert list(twin.state_dict()) == list(fused.state_dict())


@pytest.mark.parametrize("copied", COPIES)
def test_copy_of_a_folded_model_keeps_its_report(copied):
    fused = fxfuse.fuse(small_net())
    assert fxfuse.report(copied(fused)) == fxfuse.report(fused)


@pytest.mark.parametrize("copied", COPIES)
def test_copy_of_a_folded_model_with_a_rank_check_keeps_it(copied):
    x = noise(3, 4)
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    twin = copied(check(model, x, folded=1, example_inputs=(x,)))
    assert_exact(model(x), twin(x))
    with pytest.raises(AssertionError, match="2 axes"):
        twin(noise(3, 4, 4))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_folded_model_is_exported(form, strict):
    model = form(small_net(), X)
    fused = fxfuse.fuse(model)
    program = torch.export.export(fused, (X,), strict=strict)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("batch_norm" in name for name in operators) == 1
    assert_exact(model(X), program.module()(X))


def test_folded_model_with_a_rank_check_is_exported():
    model, x = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), noise(3, 4)
    fused = check(model, x, folded=1, example_inputs=(x,))
    program = torch.export.export(fused, (x,))
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert_exact(model(x), program.module()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folded_model_is_cast_as_a_whole_and_the_source_is_not(dtype):
    model = small_net()
    before = snapshot(model)
    fused = fxfuse.fuse(model).to(dtype)
    assert {tensor.dtype for tensor in fused.parameters()} == {dtype} == {fused(X.to(dtype)).dtype}
    assert_untouched(before, model)


# 69
@pytest.mark.parametrize(
    ("root", "x", "left"),
    [
        (nn.BatchNorm1d(3), noise(2, 3), ["FXF103"]),
        (nn.BatchNorm2d(3), X, ["FXF103"]),
        (nn.BatchNorm3d(3, affine=False), noise(2, 3, 2, 2, 2), ["FXF103"]),
        (nn.Sequential(nn.BatchNorm2d(3)), X, ["FXF103"]),
        (nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)), X, ["FXF103"]),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), X, ["FXF102", "FXF103"]),
        (nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)), X, ["FXF103", "FXF107"]),
        (nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3)), X, ["FXF103"]),
        (nn.Sequential(nn.Softmax(1), nn.BatchNorm2d(3)), X, ["FXF102"]),
        (nn.Conv2d(3, 4, 1), X, []),
        (nn.Linear(6, 2), X, []),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), X, []),
        (nn.Sequential(), X, []),
        (nn.Identity(), X, []),
        (Forward(lambda m, x: None), X, []),
        (Forward(lambda m, x: 3), X, []),
        (Forward(lambda m, x: (x, [x])), X, []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_model_with_nothing_to_fold_comes_back_as_it_was(root, x, left):
    check(randomise(copy.deepcopy(root)), x, left=left)


# 70
@pytest.mark.parametrize("form", [modules, functions])
@pytest.mark.parametrize("known", [True, False])
def test_folded_model_takes_any_batch_height_and_width(known, form):
    layers = [*pair(stride=2, padding=1), nn.ReLU(), *pair(4, 4, padding="same"), nn.AdaptiveAvgPool2d(2)]
    model = form(randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))))
    fused = check(model, X, folded=3, example_inputs=(X,) if known else None)
    for shape in ((1, 3, 6, 6), (5, 3, 4, 9), (2, 3, 17, 3)):
        x = noise(*shape)
        assert_exact(model(x).detach(), fused(x).detach())


def test_exported_model_with_dynamic_sizes_stays_dynamic():
    model = randomise(nn.Sequential(*pair(), nn.ReLU(), *pair(4, 4)))
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    graph = torch.export.export(model, (X,), dynamic_shapes=sizes).module()
    for module in graph.modules():
        module.training = False
    fused = check(graph, X, folded=2)
    for shape in ((3, 3, 7, 9), (4, 3, 12, 6)):
        assert_exact(model(noise(*shape)).detach(), fused(noise(*shape)).detach())


def test_folded_model_is_exported_with_dynamic_sizes():
    model = randomise(nn.Sequential(*pair(), nn.ReLU(), *pair(4, 4)))
    fused = check(model, X, folded=2)
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(fused, (X,), dynamic_shapes=sizes).module()
    assert_exact(model(noise(3, 3, 7, 9)), program(noise(3, 3, 7, 9)))


@pytest.mark.parametrize("shape", [(4, 4), (3, 4), (4, 4, 6), (3, 4, 6)])
def test_image_without_a_batch_is_never_normalised_along_another_axis(shape):
    """A conv takes images without a batch, a norm does not: it takes their rows for channels."""
    conv = (nn.Conv1d, nn.Conv2d)[len(shape) - 2]
    for norm in (nn.SyncBatchNorm(4), nn.BatchNorm1d(4)):
        model, x = randomise(nn.Sequential(conv(shape[0], 4, 1), norm)), noise(*shape)
        aware = fxfuse.fuse(model, example_inputs=(x,))
        assert folded_of(aware) == (0, ["FXF104"])
        assert torch.equal(model(x), aware(x))
        unaware = fxfuse.fuse(model)
        if fxfuse.report(unaware).folded:
            with pytest.raises(AssertionError, match="axes"):
                unaware(x)
        else:
            assert torch.equal(model(x), unaware(x))


# 71
def shifted(amount, place=(...,)):
    def forward(_, x):
        moved = torch.zeros_like(x)
        moved[place] = amount
        return x + moved

    return Forward(forward).eval()


def test_rounding_of_a_millionth_is_none_to_the_verifier_and_a_border_pixel_is():
    x = (13.6 + 0.1 * noise(1, 2, 5, 5)).float()
    reference = shifted(0.0)
    passed = fxfuse.verify(reference, shifted(3.8e-6), (x,))
    assert passed.ok and passed.conclusive
    assert passed.max_abs == pytest.approx(3.8e-6, rel=0.01) and passed.max_rel == pytest.approx(
        2.8e-7, rel=0.05
    )
    failed = fxfuse.verify(reference, shifted(1e-3, (0, 1, 0, 4)), (x,))
    assert not failed.ok and failed.worst.index == (0, 1, 0, 4)
    with pytest.raises(fxfuse.VerificationError, match=r"output\[0, 1, 0, 4\]"):
        failed.raise_if_failed()


def test_norm_before_a_padded_conv_is_left_and_its_border_is_exact():
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, padding=1)))
    fused = check(model, X, left=["FXF305"])
    assert fxfuse.verify(model, fused, (X,)).ok


def test_functional_norm_in_float16_is_folded_as_the_module_is():
    model = randomise(nn.Sequential(*pair())).half()
    one, other = fxfuse.fuse(model), fxfuse.fuse(functions(model))
    assert folded_of(one) == folded_of(other) == (1, [])
    assert torch.equal(one(X.half()), other(X.half()))
    assert torch.equal(one(X.half()), F.conv2d(X.half(), *one.parameters()))


def test_exported_norm_in_float16_is_folded_as_the_module_is():
    model = randomise(nn.Sequential(*pair())).half()
    one, other = fxfuse.fuse(model), fxfuse.fuse(exported(model, X.half()))
    assert folded_of(one) == folded_of(other) == (1, [])
    assert torch.equal(one(X.half()), other(X.half()))


def test_folds_leaves_no_gradient_behind():
    fused = folds(small_net(), X, folded=2, refused=["FXF102"])
    assert all(parameter.grad is None for parameter in fused.parameters())
