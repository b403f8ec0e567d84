"""What wrong use is told: what was found, where, why it matters, what to do."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxfuse
from fxfuse import cli, zoo
from fxfuse.arguments import short
from fxfuse.backend import _choices
from fxfuse.capture import capture
from fxfuse.options import variants
from tests.forms import noise
from tests.support import randomise

X = torch.ones(2, 3, 8, 8)


def network():
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).float()


class Picks(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = network()

    def forward(self, batch):
        return self.block(batch["images"][0])


def line_of(function, text):
    """The line of this file, as messages name it, where `text` stands in `function`."""
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if n > code.co_firstlineno and text in line)
    return f"tests/test_errors.py:{number} in {code.co_qualname}"


def told(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


NO_MODEL = "no torch.nn.Module or ExportedProgram, so it cannot be read"
NO_MODELS = {
    "a name": ("resnet18", f"'resnet18' (str), {NO_MODEL}; pass the model itself"),
    "a number": (3, f"3 (int), {NO_MODEL}; pass the model itself"),
    "nothing": (None, f"None, {NO_MODEL}; pass the model itself"),
    "a tensor": (X, f"(2, 3, 8, 8) float32 on cpu (Tensor), {NO_MODEL}; pass the model itself"),
    "its class": (nn.Conv2d, f"the class Conv2d, {NO_MODEL}; pass an instance, Conv2d(...)"),
    "its state_dict": (
        nn.Linear(2, 3).state_dict(),
        f"{{'bias': (3,) float32 on cpu, 'weight': (3, 2) float32 on cpu}} (OrderedDict), {NO_MODEL}; "
        "weights are no computation; pass the model that has them, after model.load_state_dict(...)",
    ),
}
ENTRANCES = {
    "fuse": ("model", fxfuse.fuse),
    "explain": ("model", fxfuse.explain),
    "report": ("model", fxfuse.report),
    "verify, first": ("reference", lambda thing: fxfuse.verify(thing, network(), (X,))),
    "verify, second": ("candidate", lambda thing: fxfuse.verify(network(), thing, (X,))),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("thing", NO_MODELS)
def test_what_is_no_model_is_told_by_what_it_is(thing, entrance):
    value, message = NO_MODELS[thing]
    name, call = ENTRANCES[entrance]
    assert told(fxfuse.UsageError, lambda: call(value)) == f"the {name} is {message}"


TRAINING = "in training mode, where norms use the batch; call "
TRAINED = {
    "fuse": ("model", lambda: fxfuse.fuse(network().train())),
    "explain": ("model", lambda: fxfuse.explain(network().train())),
    "verify, first": ("reference", lambda: fxfuse.verify(network().train(), network(), (X,))),
    "verify, second": ("candidate", lambda: fxfuse.verify(network(), network().train(), (X,))),
}


@pytest.mark.parametrize("entrance", TRAINED)
def test_training_mode_is_told(entrance):
    name, call = TRAINED[entrance]
    assert told(fxfuse.UsageError, call) == f"the {name} (Sequential) is {TRAINING}{name}.eval()"


@pytest.mark.filterwarnings("ignore")  # what torch says of TorchScript and of its compiler
def test_models_of_other_compilers_are_told():
    scripted = torch.jit.script(network())
    assert told(fxfuse.UsageError, lambda: fxfuse.fuse(scripted)) == (
        "the model is TorchScript (RecursiveScriptModule), which has no Python to trace; "
        "pass the module it was made from"
    )
    compiled = torch.compile(network())
    assert told(fxfuse.UsageError, lambda: fxfuse.fuse(compiled)) == (
        "the model is compiled already (a Sequential), too late for a fold; "
        "fold it first: torch.compile(fxfuse.fuse(model))"
    )
    program = torch.export.export(network(), (X,))
    assert told(fxfuse.UsageError, lambda: fxfuse.fuse(program, keep_modules=True)) == (
        "an exported program is one graph and has no modules to keep; leave out keep_modules=True"
    )
    assert told(fxfuse.UsageError, lambda: fxfuse.report(compiled)) == (
        "this OptimizedModule was not called yet, or is not compiled with backend='fxfuse', "
        "or Dynamo compiled nothing of it; call it on an input, then ask for the report"
    )


def test_models_that_are_not_ready_are_told():
    lazy = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d()).eval()
    assert told(fxfuse.UsageError, lambda: fxfuse.fuse(lazy)) == (
        "6 lazy parameters are not initialised yet (0.weight, 0.bias, 1.weight, ...) and cannot be folded; "
        "run the model once on an input first"
    )
    assert told(fxfuse.UsageError, lambda: fxfuse.report(network())) == (
        "this Sequential was not made by fxfuse, or comes out of a file of torch.export, "
        "which keeps no report; fxfuse.explain(model) tells what can be folded"
    )
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert told(fxfuse.UsageError, lambda: fxfuse.fuse(network())) == (
            "global module hooks are registered (forward pre hooks) and would see folded values; "
            "remove them first"
        )
    finally:
        hook.remove()


POSITIONAL = "it has to hold all positional inputs of forward: pass a tuple, (x,) or (x, y)"


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (X, "(2, 3, 8, 8) float32 on cpu (Tensor)"),
        ({"x": X}, "{'x': (2, 3, 8, 8) float32 on cpu} (dict)"),
        ("x", "'x' (str)"),
        (X.shape, "torch.Size([2, 3, 8, 8]) (Size)"),
    ],
)
def test_inputs_that_are_no_tuple_are_told(inputs, found):
    message = told(fxfuse.UsageError, lambda: fxfuse.fuse(network(), example_inputs=inputs))
    assert message == f"example_inputs is {found}; {POSITIONAL}"
    message = told(fxfuse.UsageError, lambda: fxfuse.verify(network(), network(), inputs))
    assert message == f"inputs is {found}; {POSITIONAL}"


CONVERTS = ": x.to(device, dtype) converts it"
# Of messages that are partly torch's own: how they begin and end.
REJECTED = {
    "another number of channels": (network, (X[:, :2],), "(2, 2, 8, 8) float32 on cpu: ", "at 0 (Conv2d)"),
    "another dtype": (
        network,
        (X.double(),),
        "(2, 3, 8, 8) float64 on cpu: ",
        f"at 0 (Conv2d); the model is float32 on cpu, an input float64 on cpu{CONVERTS}",
    ),
    "another device": (
        network,
        (X.to("meta"),),
        "(2, 3, 8, 8) float32 on meta: ",
        f"at 1 (BatchNorm2d); the model is float32 on cpu, an input float32 on meta{CONVERTS}",
    ),
    "arrays of numpy": (
        network,
        (np.zeros((2, 3, 8, 8)),),
        "ndarray (2, 3, 8, 8) float64: ",
        "tuple, tuple, tuple, int), at 0 (Conv2d); models take tensors: torch.from_numpy(array) makes one",
    ),
    "no inputs": (network, (), "(): ", "at Sequential"),
    "integers": (network, (X.long(),), "(2, 3, 8, 8) int64 on cpu: ", "should be the same, at 0 (Conv2d)"),
    "a collection of something else": (
        Picks,
        ({"images": [X.double()] * 9, "labels": [1]},),
        f"{{'images': [{', '.join(['(2, 3, 8, 8) float64 on cpu'] * 6)}, ...], 'labels': [1]}}: ",
        f"at block.0 (Conv2d), {line_of(Picks.forward, 'self.block(batch')}; "
        f"the model is float32 on cpu, an input float64 on cpu{CONVERTS}",
    ),
    "a wrong collection": (
        Picks,
        (X,),
        "(2, 3, 8, 8) float32 on cpu: ",
        line_of(Picks.forward, "self.block(batch"),
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_inputs_that_the_model_rejects_are_told_with_place_and_difference(case):
    make, inputs, begin, end = REJECTED[case]
    model = make().eval()
    messages = {
        "the model rejects the example inputs ": lambda: fxfuse.fuse(model, example_inputs=inputs),
        "the reference rejects the inputs ": lambda: fxfuse.verify(model, model, inputs),
    }
    for first, call in messages.items():
        message = told(fxfuse.UsageError, call)
        assert message.startswith(first + begin) and message.endswith(end), message
        assert "\n" not in message and len(message) < 600


def test_candidate_that_rejects_the_inputs_is_told_likewise():
    result = fxfuse.verify(network(), network().double(), (X,))
    assert not result.ok
    assert result.notes[0].startswith("the candidate rejects the inputs (2, 3, 8, 8) float32 on cpu: ")
    assert "at 0 (Conv2d); the model is float64 on cpu, an input float32 on cpu" in result.notes[0]
    assert "the candidate rejects" in told(fxfuse.VerificationError, result.raise_if_failed)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (noise(2, 3), "(2, 3) float64 on cpu"),
        ([noise(1)] * 50, f"[{', '.join(['(1,) float64 on cpu'] * 6)}, ...]"),
        ({"a": (np.zeros(3, dtype=np.float32), 1)}, "{'a': (ndarray (3,) float32, 1)}"),
        ("x" * 1000, f"'{'x' * 12}...{'x' * 13}'"),
        (network(), "Sequential( ..._stats=True) )"),
    ],
)
def test_values_are_told_in_one_short_line(value, expected):
    assert short(value) == expected


class Twice(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        y.transpose_(2, 3)
        return y


class Reserved(nn.Module):
    def __init__(self):
        super().__init__()
        self.meta = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.meta(x)


class Fills(nn.Module):
    def forward(self, x):
        zeros = torch.zeros(3)
        return x + zeros.add_(x.sum())


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def replaced():
    model = nn.Conv2d(3, 3, 1)
    model.forward = lambda x: x
    return model


CAPTURES = {
    "a call of its own": (
        lambda: Twice(3, 3, 1),
        "Twice has a __call__ of its own, which a trace of forward would miss; do in forward what it does",
    ),
    "a forward of the instance": (
        replaced,
        "the forward of this Conv2d was replaced on the instance, so its class is not what it computes; "
        "remove the replacement (del model.forward) or wrap the model",
    ),
    "a shape changed in place": (
        Turned,
        "forward changes the shape of a tensor in place, by transpose_, "
        f"{line_of(Turned.forward, 'y.transpose_')}, after which no shape is certain; "
        "write transpose(...) for transpose_(...), and so on",
    ),
    "a name of GraphModule's": (
        Reserved,
        "a GraphModule has an attribute 'meta' of its own, as has Reserved; "
        "rename that module, parameter or buffer",
    ),
    "a write to what forward makes": (
        Fills,
        f"forward writes to a tensor that it has made itself, by add_, {line_of(Fills.forward, 'add_')}; "
        "in a graph it would be one tensor for all calls",
    ),
    "control flow": (
        Branches,
        re.compile(
            r"Branches cannot be traced: .*\n"
            r"  at .*test_errors.py:\d+ in forward: return x if x.sum\(\) > 0 else -x\n"
            r"  A graph cannot hold control flow that depends on the values of tensors\."
        ),
    ),
}


@pytest.mark.parametrize("case", CAPTURES)
def test_what_cannot_be_traced_is_told_with_its_line(case):
    make, expected = CAPTURES[case]
    message = told(fxfuse.CaptureError, lambda: capture(make().eval()))
    assert expected.fullmatch(message) if isinstance(expected, re.Pattern) else message == expected
    assert message in "".join(fxfuse.explain(make().eval()).notes)  # and no error for who folds it


class Any(nn.Module):
    def forward(self, *xs):
        return xs


class Named(nn.Module):
    def forward(self, x, mode="fast"):
        return x


class Many(nn.Module):
    def forward(self, x, a=False, b=False, c=False, d=False, e=False, f=False):
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Any(), "forward of Any takes any number of arguments, so its calls cannot all be traced"),
        (
            Named(),
            "forward of Named takes an option mode='fast', of which not every choice can be traced, "
            "as it can of None, True and False",
        ),
        (
            Many(),
            "forward of Many takes 6 options (a, b, c, d, e, f), which makes 64 choices; up to 16 are traced",
        ),
    ],
)
def test_options_that_cannot_all_be_tried_are_told(model, message):
    assert told(fxfuse.CaptureError, lambda: variants(model, [])) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"than": "eager", "also": 1},
            "backend fxfuse has no options also, than; it has then='inductor' (or what else compiles "
            "the folded graph, or 'lower', for fxfuse's engine \"torch\") and refold='changed' (or 'always')",
        ),
        ({"refold": "never"}, "refold='never' is neither of 'changed', 'always'"),
        (
            {"then": "nobody"},
            "then='nobody' is neither 'lower' nor a backend of torch.compile, which has to compile the "
            "folded graph; "
            "torch.compiler.list_backends(None) names them",
        ),
        (
            {"then": "lower", "refold": "always"},
            "refold='always' keeps weights variable, and then='lower' makes constants of them",
        ),
        (
            {"then": "fxfuse"},
            "then='fxfuse' would be this backend again; name the one that compiles the graph",
        ),
    ],
)
def test_wrong_options_of_the_backend_are_told(options, message):
    assert told(fxfuse.UsageError, lambda: _choices(None, **options)) == message


def factory():
    return network()


def text():
    return "no model"


HERE = "tests.test_errors"
COMMANDS = {
    (
        "fuse",
        "resnet18",
    ): "'resnet18' names no model; use torchvision:NAME, timm:NAME, package.module:factory or FILE.pt2",
    ("fuse", f"{HERE}:absent"): (
        f"cannot load {HERE}:absent: AttributeError: module '{HERE}' has no attribute 'absent'; "
        "the module is imported from here or from what is installed, and the factory called without arguments"
    ),
    ("fuse", f"{HERE}:text"): (f"{HERE}:text gave a str, not a torch.nn.Module; it has to return the model"),
    ("fuse", "damaged.pt2"): (
        "damaged.pt2 is damaged, or not a zip archive (File is not a zip file), and what it holds cannot be "
        "trusted; copy or download it again"
    ),
    ("fuse", f"{HERE}:factory", "-o", "x.onnx"): (
        "cannot write x.onnx: an exported program is a .pt2 file; call it that"
    ),
    ("fuse", "damaged.pt2", "-o", "damaged.pt2"): (
        "cannot write damaged.pt2: it is the same file as damaged.pt2, which would be lost; use another name"
    ),
    ("fuse", f"{HERE}:factory", "-o", "x.pt2"): (
        f"no input is known for {HERE}:factory, without which torch.export cannot run it to write x.pt2; "
        "say which with --input 1,3,224,224"
    ),
    ("fuse", f"{HERE}:factory", "-o", "nowhere/x.pt2"): (
        "cannot write nowhere/x.pt2: there is no folder nowhere"
    ),
    ("fuse", f"{HERE}:factory", "--json", "."): "cannot write .: it is a folder",
    ("verify", f"{HERE}:factory"): (
        f"no input is known for {HERE}:factory, without which nothing can be compared; "
        "say which with --input 1,3,224,224"
    ),
    ("list", "no such name"): ("no model has 'no such name' in its name; fxfuse list prints all names"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("damaged.pt2").write_text("PK")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_wrong_commands_are_told(arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert (result.exit_code, result.stderr, result.stdout) == (2, f"Error: {COMMANDS[arguments]}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fuse",), "Missing argument 'MODEL'"),
        (("fuse", "x:y", "--input", "1,x"), "'1,x' is no shape; write sizes with commas, as in 1,3,224,224"),
        (("fuse", "x:y", "--imput", "1"), "No such option '--imput'"),
        (("fold", "x:y"), "No such command 'fold'"),
    ],
)
def test_commands_that_cannot_be_parsed_are_told(arguments, message):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2 and message in result.stderr and not result.stdout


def test_files_that_are_missing_are_told_with_the_folder_in_which_they_are_looked_for(folder):
    assert (
        told(fxfuse.UsageError, lambda: zoo.load("absent.pt2"))
        == f"there is no file absent.pt2, seen from {folder}"
    )


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_libraries_that_are_missing_are_told(library, monkeypatch):
    getattr(zoo, library).cache_clear()
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda _: None)
    assert told(fxfuse.UsageError, lambda: zoo.load(f"{library}:x")) == (
        f"{library}, which has that model, is not installed; pip install 'fxfuse[zoo]'"
    )
