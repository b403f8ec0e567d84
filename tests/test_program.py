"""fuse(exported_program): folded in its own graph, before and after run_decompositions."""

from __future__ import annotations

import copy
import io
import shutil

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx

import fxfuse
from fxfuse import zoo
from tests.forms import EXPORT_WARNING, Forward, noise
from tests.support import assert_exact, randomise

pytestmark = [
    pytest.mark.filterwarnings(EXPORT_WARNING),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own exporters
]
X = noise(2, 3, 8, 8)
NORMS = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training")
WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler"
)


class Net(nn.Module):
    """Norms behind, between and in front of operators; with biases and without."""

    def __init__(self):
        super().__init__()
        self.one, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.up, self.bn2 = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)
        # Square: a weight whose axes are mistaken would run.
        self.fc1, self.bn3 = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)
        self.bn4, self.fc2 = nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        y = torch.relu(self.bn1(self.one(x)))
        y = F.max_pool2d(torch.relu(self.bn2(self.up(y))), 2)
        y = torch.relu(self.bn3(self.fc1(y.mean((2, 3)))))
        return self.fc2(self.bn4(y))


def training(program):
    return program


def decomposed(program):
    return program.run_decompositions()


DIALECTS = (training, decomposed)
dialects = pytest.mark.parametrize("dialect", DIALECTS)


def export(model, *inputs, dialect=training, batch=True):
    shapes = tuple({0: Dim.AUTO} for _ in inputs) if batch else None
    return dialect(torch.export.export(model, inputs, dynamic_shapes=shapes))


def norms(program):
    return sum(
        getattr(node.target, "__name__", "").partition(".")[0] in NORMS for node in program.graph.nodes
    )


def described(program):
    """All that must not change in a source."""
    state = {name: (id(tensor), tensor.clone()) for name, tensor in program.state_dict.items()}
    return str(program.graph), str(program.graph_signature), state


def ran(program, inputs):
    """What a copy of the program gives, since a program may write to its buffers and its inputs."""
    return copy.deepcopy(program).module()(*copy.deepcopy(inputs))


def checked(program, *inputs, folded, left=()):
    """Folds a program, and checks what holds for every one: numbers, source, idempotence, signature, file."""
    before = described(program)
    fused = fxfuse.fuse(program)
    report = fxfuse.report(fused)
    assert isinstance(fused, torch.export.ExportedProgram) and fused is not program
    assert (len(report.folded), sorted(each.code for each in report.refused)) == (folded, sorted(left))
    assert norms(fused) == norms(program) - folded
    for one, two in zip(before, described(program), strict=True):
        assert str(one) == str(two)
    expected = ran(program, inputs)
    assert_exact(expected, ran(fused, inputs))
    again = fxfuse.fuse(fused)
    assert not fxfuse.report(again).folded and str(again.graph) == str(fused.graph)
    ours, theirs = fused.graph_signature, program.graph_signature
    assert (ours.user_inputs, ours.user_outputs) == (theirs.user_inputs, theirs.user_outputs)
    assert str(fused.range_constraints) == str(program.range_constraints)
    weights = {spec.target for spec in ours.input_specs if spec.kind in WEIGHTS}
    assert weights == {*fused.state_dict, *fused.constants}
    file = io.BytesIO()
    torch.export.save(fused, file)
    file.seek(0)
    assert_exact(expected, ran(torch.export.load(file), inputs))
    return fused


@dialects
def test_program_is_folded_for_every_batch(dialect):
    model = randomise(Net())
    fused = checked(export(model, X, dialect=dialect), X, folded=4)
    for batch in (2, 3, 7):
        assert_exact(model(noise(batch, 3, 8, 8)), fused.module()(noise(batch, 3, 8, 8)))
    names = {
        "one.weight",
        "one.bias",
        "up.weight",
        "up.bias",
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
    }
    assert {*fused.state_dict} == names
    assert {name: fused.state_dict[name].shape for name in ("one.bias", "fc2.weight", "up.weight")} == {
        "one.bias": (4,),
        "fc2.weight": (6, 6),
        "up.weight": (4, 3, 2, 2),
    }
    assert all(isinstance(tensor, nn.Parameter) for tensor in fused.state_dict.values())


@dialects
def test_program_stays_in_its_dialect(dialect):
    program = export(randomise(Net()), X, dialect=dialect)
    fused = checked(program, X, folded=4)
    kinds = {node.target for node in program.graph.nodes if node.op == "call_function"}
    new = {node.target for node in fused.graph.nodes if node.op == "call_function"} - kinds
    assert new <= {torch.ops.aten.addmm.default}  # mm with a bias
    assert not any(node.op == "call_function" and node.kwargs for node in fused.graph.nodes)
    again = fused.run_decompositions()
    assert_exact(program.module()(X), again.module()(X))


@dialects
def test_example_inputs_are_verified_and_remembered(dialect):
    program = export(randomise(Net()), X, dialect=dialect)
    fused = fxfuse.fuse(program, example_inputs=(torch.Size((3, 3, 8, 8)),))
    comparison = fxfuse.report(fused).verification
    assert comparison.ok and comparison.conclusive
    assert fxfuse.verify(program, fused, (X,)).ok and fxfuse.verify(randomise(Net()), fused, (X,)).ok
    assert torch.equal(fused.example_inputs[0][0], X)
    other = export(randomise(Net(), seed=3), X, dialect=dialect)
    assert not fxfuse.verify(program, other, (X,)).ok


@dialects
def test_changes_of_the_result_leave_the_source_alone(dialect):
    model = randomise(nn.Sequential(Net(), nn.ReLU(), nn.Linear(6, 2)))
    program = export(model, X, dialect=dialect)
    before = described(program)
    fused = fxfuse.fuse(program)
    weight, ours = program.state_dict["2.weight"], fused.state_dict["2.weight"]
    assert ours is not weight and ours.data_ptr() == weight.data_ptr()  # of no norm: the memory is shared
    fused.module().half().requires_grad_(False)
    fused.graph_signature.replace_all_uses(fused.graph_signature.user_outputs[0], "other")
    fused.graph_signature.replace_all_uses(fused.graph_signature.user_inputs[0], "another")
    assert str(before) == str(described(program)) and weight.requires_grad and weight.dtype is torch.float64
    assert_exact(model(X), program.module()(X))


@dialects
def test_explain_says_what_fuse_would(dialect):
    program = export(randomise(Net()), X, dialect=dialect)
    before = described(program)
    report = fxfuse.explain(program)
    assert report == fxfuse.report(fxfuse.fuse(program)) and len(report.folded) == 4
    assert [fold.norm for fold in report.folded] == ["bn1", "bn2", "bn3", "bn4"]
    assert [fold.into for fold in report.folded] == [("one",), ("up",), ("fc1",), ("fc2",)]
    assert str(before) == str(described(program))


@dialects
def test_outputs_keep_their_names_and_places(dialect):
    def forward(m, x):
        y = m.conv(x)
        return {"norm": m.norm(y), "weight": m.conv.weight, "again": (m.norm2(m.conv2(x)), x.shape[0])}

    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    others = {"conv2": nn.Conv2d(3, 4, 3, bias=False), "norm2": nn.BatchNorm2d(4)}
    model = randomise(Forward(forward, **layers, **others))
    fused = checked(export(model, X, dialect=dialect), X, folded=2)
    assert_exact(model(X), fused.module()(X))
    assert {"conv.weight", "conv_weight_folded"} <= {*fused.state_dict}  # the output is the old one


@dialects
def test_inputs_by_keyword_and_in_containers(dialect):
    class Model(Net):
        def forward(self, batch, *, scale):
            return super().forward(batch["image"] * scale)

    model = randomise(Model())
    program = dialect(torch.export.export(model, ({"image": X},), {"scale": torch.tensor(2.0).double()}))
    fused = fxfuse.fuse(program)
    assert len(fxfuse.report(fused).folded) == 4
    scale = torch.tensor(3.0).double()
    assert_exact(model({"image": X}, scale=scale), fused.module()({"image": X}, scale=scale))


@dialects
@pytest.mark.parametrize("persistent", [True, False])
def test_weights_that_are_buffers_and_constants(persistent, dialect):
    def forward(m, x):
        m.steps.add_(1)
        y = F.batch_norm(F.conv2d(x, m.w), m.mean, m.var, m.g, None)
        return y * m.scale + torch.ones(1, dtype=torch.float64)

    model = Forward(forward, steps=torch.zeros(1), scale=nn.Parameter(torch.ones(4, 1, 1)))
    for name, shape in (("w", (4, 3, 3, 3)), ("mean", (4,)), ("var", (4,)), ("g", (4,))):
        value = noise(*shape).exp() if name == "var" else noise(*shape)
        model.register_buffer(name, value, persistent=persistent)
    model.steps = torch.zeros(1, dtype=torch.float64)
    program = export(randomise(model), X, dialect=dialect)
    fused = checked(program, X, folded=1)
    assert "w" in (fused.state_dict if persistent else fused.constants)
    assert not {"mean", "var", "g"} & {*fused.state_dict, *fused.constants}
    kinds = [spec.kind for spec in fused.graph_signature.input_specs]
    order = [InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT]
    assert kinds == sorted(kinds, key=order.index)
    module = fused.module()
    steps = module.steps.item()
    module(X)
    assert module.steps.item() == steps + 1  # what the model writes to, the folded one writes to


@dialects
def test_statistics_that_the_program_changes_are_not_folded(dialect):
    def forward(m, x):
        m.norm.running_mean.mul_(0.5)
        return m.norm(m.conv(x))

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    program = export(model, X, dialect=dialect)
    fused = copy.deepcopy(checked(program, X, folded=0, left=["FXF205"])).module()
    for _ in range(3):
        assert_exact(model(X), fused(X))


@dialects
def test_norm_in_training_mode_stays(dialect):
    model = randomise(Net())
    model.bn1.train()
    program = export(model, X, dialect=dialect)
    fused = fxfuse.fuse(program)
    assert [each.code for each in fxfuse.report(fused).refused] == ["FXF202"]
    one, two = copy.deepcopy(program).module(), fused.module()
    for _ in range(2):
        assert_exact(one(X), two(X))
    assert_exact(one.bn1.running_mean, two.bn1.running_mean)


@dialects
def test_modules_and_parameters_that_are_shared_change_for_one_call_only(dialect):
    def forward(m, x):
        return m.norm(m.conv(x)), m.other(m.conv(x)), m.conv(x), m.norm(m.twin(x))

    conv, twin = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    twin.weight = conv.weight
    model = randomise(Forward(forward, conv=conv, twin=twin, norm=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4)))
    fused = checked(export(model, X, dialect=dialect), X, folded=3)
    assert_exact(model(X), fused.module()(X))


@dialects
@pytest.mark.parametrize("tokens", [4, 6])
def test_channels_of_tokens_are_proved_by_sizes_that_are_guarded(tokens, dialect):
    """A linear layer decomposes into a product of matrices between two views."""

    def forward(m, x):
        y = m.norm(m.fc(x).transpose(1, 2)).transpose(1, 2)
        return m.last(m.norm2(y.mean(1)))

    layers = {"fc": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "norm2": nn.BatchNorm1d(6)}
    model = randomise(Forward(forward, **layers, last=nn.Linear(6, 6)))
    x = noise(3, tokens, 4)
    fused = checked(export(model, x, dialect=dialect), x, folded=2)
    assert_exact(model(noise(5, tokens, 4)), fused.module()(noise(5, tokens, 4)))


@dialects
@pytest.mark.parametrize("size", [2, 4])
def test_norm_over_tokens_of_the_channels_size_is_left(size, dialect):
    model = randomise(nn.Sequential(nn.Linear(5, size), nn.BatchNorm1d(size)))
    x = noise(3, size, 5)
    code = "FXF104" if dialect is training else "FXF108"  # behind a view of the product
    checked(export(model, x, dialect=dialect), x, folded=0, left=[code])


@dialects
def test_constants_that_forward_makes_are_constants(dialect):
    def forward(m, x):
        y = m.conv(x) * torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)[:, None, None]
        return m.norm(y + torch.full((4, 1, 1), 0.3, dtype=torch.float64))

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    model.requires_grad_(True)
    fused = checked(export(model, X, dialect=dialect), X, folded=1)
    assert len(fxfuse.report(fused).constants) == 2
    assert all(parameter.requires_grad for parameter in model.parameters())


@dialects
def test_effects_on_constants_and_random_numbers_stay(dialect):
    def forward(m, x):
        torch._assert_async((m.norm.running_var > 0).all(), "no variance")
        return m.norm(m.conv(x)) * torch.empty(4, 1, 1, dtype=torch.float64).uniform_(1, 1)

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    fused = checked(export(model, X, dialect=dialect), X, folded=1)
    assert "_assert_async" in str(fused.graph) and "running_var" in str(fused.graph_signature)


def test_shape_that_changes_in_place_leaves_all_norms():
    def forward(m, x):
        y = m.conv(x)
        y.transpose_(1, 2)
        return m.norm(y.transpose(1, 2))

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    program = export(model, X)
    checked(program, X, folded=0, left=["FXF110"])
    checked(decomposed(program), X, folded=1)  # where nothing is done in place


@dialects
@torch.no_grad()
def test_norms_in_branches_of_a_condition_are_accounted_for(dialect):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.inner = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return torch.cond(x.sum() > 0, self.inner, lambda y: y.sin(), (y,))

    model = randomise(Branches())
    program = export(model, X, dialect=dialect, batch=False)
    fused = fxfuse.fuse(program)
    report = fxfuse.report(fused)
    assert len(report.folded) == 1 and [each.code for each in report.refused] == ["FXF208"]
    for x in (X, -X, X.abs(), -X.abs()):
        assert_exact(model(x), fused.module()(x))


@dialects
def test_unflattened_modules_compute_the_same(dialect):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    fused = fxfuse.fuse(export(model, X, dialect=dialect, batch=False))
    assert_exact(model(X), torch.export.unflatten(fused)(X))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")  # unflatten itself
@pytest.mark.parametrize(("kept", "code"), [("conv", "FXF112"), ("block", "FXF112"), ("other", None)])
@pytest.mark.parametrize("last", [True, False])
@dialects
def test_norms_stay_in_modules_whose_calls_are_preserved(kept, code, last, dialect):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.conv, self.block = nn.ReLU(), nn.Conv2d(3, 4, 3), Block()

        def forward(self, x):
            y = self.block(self.conv(self.other(x)))
            return y if last else y.exp()

    model = randomise(Outer())
    program = dialect(torch.export.export(model, (X,), preserve_module_call_signature=(kept,)))
    fused = fxfuse.fuse(program)
    assert [each.code for each in fxfuse.report(fused).refused] == ([code] if code else [])
    modules = torch.export.unflatten(fused)
    assert_exact(model(X), modules(X))
    x = noise(2, 4, 6, 6) if kept == "block" else X
    assert_exact(model.get_submodule(kept)(x), modules.get_submodule(kept)(x))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")  # unflatten itself
def test_modules_whose_calls_are_preserved_are_found_again():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

        def forward(self, x):
            return self.head(self.stem(x))

    model = randomise(Outer())
    program = torch.export.export(model, (X,), preserve_module_call_signature=("stem", "head"))
    fused = fxfuse.fuse(program)
    assert len(fxfuse.report(fused).folded) == 2
    modules = torch.export.unflatten(fused)
    assert_exact(model(X), modules(X))
    assert_exact(model.stem(X), modules.stem(X))
    assert [entry.fqn for entry in program.module_call_graph if entry.signature] == ["", "stem", "head"]


@dialects
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_real_networks_fold_whole(name, dialect):
    model = randomise(zoo.torchvision().models.get_model(name, weights=None))
    expected = fxfuse.explain(model)
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        checked(export(model, x, dialect=dialect), x, folded=len(expected.folded))
    assert not expected.refused


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("functional", [True, False])
def test_graphs_of_make_fx_are_folded(mode, functional):
    """They guard nothing: example inputs tell numbers of axes, which the graph then asserts."""
    model = randomise(Net()).requires_grad_(False)
    traced = torch.func.functionalize(model) if functional else model
    graph = make_fx(traced, tracing_mode=mode, _allow_non_fake_inputs=True)(X).eval()
    fused = fxfuse.fuse(graph, example_inputs=(X,))
    report = fxfuse.report(fused)
    assert len(report.folded) == 4 and not report.refused
    assert not any("batch_norm" in str(node.target) for node in fused.graph.nodes)
    assert_exact(model(X), fused(X))
    if mode == "symbolic":
        assert_exact(model(noise(5, 3, 8, 8)), fused(noise(5, 3, 8, 8)))


@pytest.mark.parametrize("strict", [True, False])
@dialects
def test_the_module_of_a_program_is_folded_as_a_graph(dialect, strict):
    """As ``capture_pre_autograd_graph`` gave it."""
    model = randomise(Net())
    module = dialect(torch.export.export(model, (X,), strict=strict)).module()
    fused = fxfuse.fuse(module)
    assert len(fxfuse.report(fused).folded) == 4
    assert_exact(model(X), fused(X))


@needs_compiler
@dialects
def test_result_is_compiled_ahead_of_time(dialect, tmp_path):
    model = randomise(Net()).float()
    fused = fxfuse.fuse(export(model, X.float(), dialect=dialect))
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(fused, package_path=str(tmp_path / "net.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for batch in (2, 5):
            x = noise(batch, 3, 8, 8).float()
            torch.testing.assert_close(compiled(x), model(x))


@dialects
def test_result_runs_in_onnx_runtime(dialect, tmp_path):
    model = randomise(Net()).float()
    fused = fxfuse.fuse(export(model, X.float(), dialect=dialect))
    file = tmp_path / "net.onnx"
    torch.onnx.export(fused, (X.float(),), f=file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = noise(batch, 3, 8, 8).float()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach())
