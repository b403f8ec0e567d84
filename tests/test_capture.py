"""Capture: what is traced, what is called as a whole, and what cannot be captured is told clearly."""

import copy
import itertools
import math
import re
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.capture import capture
from tests.support import assert_exact, assert_untouched, folds, randomise, snapshot

IMAGE = torch.randn(2, 3, 9, 9, dtype=torch.float64)


def assert_refused_by_capture_alone(model, message, *calls, refused=()):
    """That no graph of `model` can be made, and `fuse`, which needs none, gives what behaves like it."""
    before = snapshot(model)
    with pytest.raises(fxfuse.CaptureError, match=message):
        capture(model)
    fused = copy.deepcopy(fxfuse.fuse(model))
    assert_untouched(before, model)
    report = fxfuse.report(fused)
    assert type(fused) is type(model)
    assert re.search(message, "\n".join(report.notes))
    assert sorted(refusal.code for refusal in report.refused) == sorted(refused), report
    for inputs in calls:
        assert_exact(run_of(model, inputs), run_of(fused, inputs))


def run_of(model, inputs):
    torch.manual_seed(0)
    return model(*copy.deepcopy(inputs))


def same_padding(size, kernel, stride):
    return max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)


def normalised(x, mean, var):
    return F.batch_norm(x, mean, var)


def normalised_by_size(x, mean, var):
    return normalised(x, mean, var) if x.shape[0] > 1 else x


class SamePadding(nn.Conv2d):
    def forward(self, x):
        height, width = (same_padding(size, 3, 2) for size in (x.shape[-2], x.shape[-1]))
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, stride=2)


@pytest.mark.parametrize("size", [9, 10, 13])
def test_a_function_with_control_flow_is_called_by_the_graph_and_not_specialised(size):
    model = randomise(nn.Sequential(SamePadding(3, 4, 3), nn.BatchNorm2d(4)))
    original = same_padding
    fused = folds(model, torch.randn(1, 3, size, size, dtype=torch.float64), folded=1)
    assert same_padding is original
    assert any(node.target is same_padding for node in fused.graph.nodes)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


def test_control_flow_in_a_module_is_an_error_that_names_line_and_reason():
    message = r"test_capture\.py[\s\S]*if x\.sum\(\) > 0:[\s\S]*control flow"
    assert_refused_by_capture_alone(Branching().eval(), message, (IMAGE,), (-IMAGE,))


def test_a_module_with_control_flow_is_called_as_a_whole_and_the_rest_is_folded():
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Branching(), nn.BatchNorm2d(3), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    fused = folds(model, IMAGE, folded=2, refused=["FXF102"])
    assert [node.target for node in fused.graph.nodes if node.op == "call_module"].count("2") == 1
    assert {bool(model[:2](x).sum() > 0) for x in (IMAGE + 50, IMAGE - 50)} == {True, False}
    for x in (IMAGE + 50, IMAGE - 50):
        assert_exact(model(x), fused(x))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x, mask=None, double=False, scale=1.0):
        y = self.norm(self.conv(x))
        if mask is None:
            y = y + 1
        if double:
            y = y * 2
        return y * scale


def test_optional_arguments_of_a_graph_keep_their_default_and_say_so_when_given():
    graph = capture(randomise(Optional())).module()
    assert_exact(randomise(Optional())(IMAGE), graph(IMAGE))
    with pytest.raises(AssertionError, match="mask has been specialized"):
        graph(IMAGE, IMAGE)
    with pytest.raises(AssertionError, match="double has been specialized"):
        graph(IMAGE, None, True)


def test_model_with_optional_arguments_is_folded_for_every_choice_of_them():
    model = randomise(Optional())
    fused = folds(model, IMAGE, folded=1)
    assert type(fused) is Optional and type(fused.norm) is nn.Identity
    assert "options (mask, double)" in " ".join(fxfuse.report(fused).notes)
    for mask, double, scale in itertools.product((None, IMAGE), (False, True), (1.0, 3.0)):
        assert_exact(model(IMAGE, mask, double, scale), fused(IMAGE, mask, double, scale))


class AsksForClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        inputs = [x] if isinstance(x, torch.Tensor) else x
        y = self.norm(self.conv(inputs[0]))
        return y if isinstance(y, (tuple, list)) else y * 2


def test_a_model_that_asks_for_the_type_of_its_input_is_kept_and_right_for_every_type():
    model = randomise(AsksForClass())
    fused = fxfuse.fuse(model)
    assert [left.code for left in fxfuse.report(fused).refused] == ["FXF209"]
    assert_exact(model(IMAGE), fused(IMAGE))
    assert_exact(model([IMAGE]), fused([IMAGE]))


class AsksAboutResults(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        y = y.contiguous() if isinstance(y, torch.Tensor) else y[0]
        if hasattr(y, "tensors"):
            y = y.tensors
        if isinstance(y + y, torch.Tensor) and isinstance(self.conv.weight, nn.Parameter):
            return y + self.conv.weight.sum()
        return -y


def test_questions_about_the_type_of_results_are_answered_for_the_value():
    folds(randomise(AsksAboutResults()), IMAGE, folded=1)


def test_a_norm_that_a_leaf_function_calls_by_way_of_another_is_refused():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return normalised_by_size(x, self.norm.running_mean, self.norm.running_var)

    folds(randomise(Calls()), IMAGE, folded=0, refused=["FXF208"])


def test_a_question_about_a_type_that_only_the_run_can_tell_is_an_error():
    class Asks(nn.Module):
        def forward(self, x):
            parts = x.split(1)
            return parts[0] if isinstance(parts, tuple) else parts

    assert_refused_by_capture_alone(Asks().eval(), "type of split is asked for", (IMAGE,))


def test_autocast_inside_forward_is_not_lost_silently():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.norm(self.conv(x))

    model = randomise(Mixed()).float()
    message = "autocast is switched inside forward"
    assert_refused_by_capture_alone(model, message, (IMAGE.float(),), refused=["FXF209"])


class Offset(nn.Module):
    """Adds a buffer, and a tensor that it makes, behind an activation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("offset", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return y + torch.ones(3, 1, 1, dtype=torch.float64) + self.offset


class Changes(nn.Module):
    """Writes to itself in forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.seen, self.calls = [], 0
        self.register_buffer("offset", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        y = self.norm(self.conv(x))
        return y + torch.ones(3, 1, 1, dtype=torch.float64) + self.offset


def test_tracing_runs_the_models_python_on_a_replica():
    model = randomise(Changes())
    before = snapshot(model)
    fused = fxfuse.fuse(model)
    assert_untouched(before, model)
    assert model.seen == [] and model.calls == 0
    assert_exact(model(IMAGE), fused(IMAGE))
    assert fused.seen == [1] and fused.calls == 1


def test_tensors_that_forward_makes_are_constants_of_the_graph():
    fused = folds(randomise(Offset()), IMAGE, folded=1)
    assert isinstance(fused, torch.fx.GraphModule)


def test_buffers_stay_buffers_in_the_graph():
    model = randomise(Offset())
    fused = fxfuse.fuse(model)
    fused.offset.add_(1)
    assert torch.allclose(fused(IMAGE), fxfuse.fuse(model)(IMAGE) + 0)  # offset is shared with the source
    assert float(model.offset) == 1.0


def test_weights_that_were_not_folded_share_memory_with_the_source_but_are_objects_of_their_own():
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)]
    model = randomise(nn.Sequential(*layers))
    fused = fxfuse.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    for name, tensor in fused.state_dict(keep_vars=True).items():
        source = model.state_dict(keep_vars=True)[name]
        assert tensor is not source and tensor.data_ptr() == source.data_ptr()


def test_a_hooked_container_is_called_as_a_whole_and_its_hook_goes_on_running():
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = randomise(nn.Sequential(inner, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    fused = folds(model, IMAGE, folded=1, refused=["FXF208"])
    calls.clear()
    fused(IMAGE)
    assert calls == [1]


def test_hooks_of_the_model_itself_are_kept():
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model.register_forward_hook(lambda _module, _args, output: output * 2)
    model.register_forward_pre_hook(lambda _module, args, kwargs: (args, kwargs), with_kwargs=True)
    folds(model, IMAGE, folded=1)


def test_a_forward_that_was_replaced_on_the_instance_is_not_traced_as_its_class():
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model.forward = types.MethodType(lambda self, x: self[0](x), model)
    assert_refused_by_capture_alone(model, "replaced on the instance", (IMAGE,), refused=["FXF210"])


def test_random_numbers_that_a_trace_would_fix_are_an_error():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(3, 1, 1)

    assert_refused_by_capture_alone(Noisy().eval(), "random numbers", (IMAGE,))


def test_a_graph_module_is_taken_as_it_is():
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    traced = torch.fx.symbolic_trace(model)
    before = snapshot(traced), traced.code
    fused = folds(traced, IMAGE, folded=1)
    assert (traced.code, "batch_norm" in fused.code) == (before[1], False)
    assert_untouched(before[0], traced)


def test_two_names_of_one_module_in_a_graph_module_are_one_module():
    conv = nn.Conv2d(3, 3, 1)
    root = randomise(nn.ModuleDict({"a": conv, "b": conv, "norm": nn.BatchNorm2d(3)}))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    normed = graph.call_module("norm", (graph.call_module("a", (x,)),))
    graph.output((normed, graph.call_module("b", (x,))))
    folds(torch.fx.GraphModule(root, graph).eval(), IMAGE, folded=1)


def test_modules_that_are_reached_without_being_registered_are_found_or_told():
    class Hidden(nn.Module):
        def __init__(self, register):
            super().__init__()
            self.layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
            if register:
                self.registered = nn.ModuleList(self.layers)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    folds(randomise(Hidden(register=True)), IMAGE, folded=1)
    hidden = Hidden(register=False).eval()
    hidden.layers = [randomise(layer) for layer in hidden.layers]
    assert_refused_by_capture_alone(hidden, "not registered as a submodule", (IMAGE,))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x * torch.sigmoid(x)


def test_a_function_with_gradients_of_its_own_is_refused_on_every_torch():
    """Some versions trace through it, and its backward is lost."""
    model = randomise(AsksForClass())
    model.__class__ = type("Model", (AsksForClass,), {"forward": lambda m, x: Swish.apply(m.norm(m.conv(x)))})
    message = "forward applies Swish, whose backward a graph does not record"
    assert_refused_by_capture_alone(model, message, (IMAGE,), refused=["FXF210"])


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: Swish.apply(m.norm(m.conv(x))),
        lambda m, x: torch.as_tensor(m.norm(m.conv(x))) if isinstance(x, torch.Tensor) else x,
    ],
)
def test_c_code_never_takes_a_proxy_for_memory(forward):
    """It would end the interpreter, and this test with it."""
    model = randomise(AsksForClass())
    model.__class__ = type("Model", (AsksForClass,), {"forward": forward})
    assert_refused_by_capture_alone(model, "cannot be traced", (IMAGE,), refused=["FXF210"])


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: [p.mul_(0.5) for p in m.conv.parameters()] and m.norm(m.conv(x)), "writes to a tensor"),
        (lambda m, x: torch.func.functional_call(m.conv, {"bias": m.norm.bias}, (x,)), "functional_call"),
        (
            lambda m, x: setattr(m.conv.weight, "data", x[:1, :, :1, :1]) or x * m.conv.weight.sum(),
            "sets data",
        ),
        (lambda m, x: setattr(m.norm, "eps", 0.5) or m.norm(m.conv(x)), "sets eps of a BatchNorm2d"),
    ],
)
def test_what_a_graph_cannot_record_is_an_error_and_does_not_touch_the_source(forward, message):
    model = randomise(AsksForClass()).requires_grad_(False)
    model.__class__ = type("Model", (AsksForClass,), {"forward": forward})
    assert_refused_by_capture_alone(model, message, (IMAGE,), (-IMAGE,), refused=["FXF210"])


def test_layers_that_are_compiled_by_themselves_are_folded():
    model = randomise(AsksForClass())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about itself when the compiler is first imported
        model.conv.compile(backend="eager")
    assert_exact(AsksForClass.forward(randomise(AsksForClass()), IMAGE), fxfuse.fuse(model)(IMAGE))


def test_a_call_of_the_models_own_is_not_missed():
    class Twice(AsksForClass):
        def __call__(self, x):
            return 2 * super().__call__(x)

    message = "Twice has a __call__ of its own"
    assert_refused_by_capture_alone(randomise(Twice()), message, (IMAGE,), refused=["FXF210"])


def test_hooks_of_the_model_itself_survive_deepcopy():
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model.register_forward_hook(lambda _module, _args, output: output * 2)
    assert_exact(model(IMAGE), copy.deepcopy(fxfuse.fuse(model))(IMAGE))


def test_every_name_in_a_capture_is_the_sources_own():
    model = randomise(AsksAboutResults())
    graph = capture(model).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["conv", "norm"]
