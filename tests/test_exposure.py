"""What a module's code does with its submodules. The judge is that code, run on opaque replacements."""

import copy
import functools
import inspect
import itertools
import textwrap
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfuse import zoo
from fxfuse.exposure import Kind, uses_of_submodules

CALLED, LOOKED_AT, EXPOSED = Kind.CALLED, Kind.LOOKED_AT, Kind.EXPOSED


class Block(nn.Module):
    """A submodule with plain data, other data, code that runs when it is read, and a submodule."""

    shape = (1, 2)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.heads, self.names, self.kind, self.none = 3, ["a"], torch.float32, None

    @property
    def asked(self):
        return 1

    def forward(self, x):
        return self.conv(x).relu()


class Sized(Block):
    def __len__(self):
        return 2

    def __iter__(self):
        return iter([self.conv, self.conv])


class Base(nn.Module):
    """The snippets below are the forward of a subclass of this."""

    conv = None  # hides the submodule of that name

    def __init__(self):
        super().__init__()
        self.a, self.b, self.sized = Block(), Block(), Sized()
        self.seq = nn.Sequential(Block(), Block())
        self.list = nn.ModuleList([Block(), Block()])
        self.dict = nn.ModuleDict({"x": Block(), "y": Block()})
        self.deep = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block())])
        self.register_module("none", None)
        self.flag, self.index, self.act = True, 0, F.relu
        self.scale = nn.Parameter(torch.ones(1))

    def step(self, x):
        return self.a(x)

    def look(self, x):
        return x * self.b.heads

    @property
    def ready(self):
        return self.b.conv is not None

    @staticmethod
    def static(x):
        return x

    @torch.no_grad()
    def decorated(self, x):
        return x + self.b.conv.bias.sum()

    def forward(self, x):
        return self.b(x) * self.b.heads


NUMBERS = itertools.count()
IMPORTS = (
    "import contextlib, functools, sys, torch; from torch import nn; from torch.nn import functional as F; "
    "from torch.utils.checkpoint import checkpoint"
)


def with_forward(body, folder, base=Base, head="def forward(self, x):"):
    """An instance of a class with that forward, whose source lies in a file, as inspect wants it."""
    file = folder / f"case{next(NUMBERS)}.py"
    file.write_text(f"{IMPORTS}\nclass Case(Base):\n    {head}\n{textwrap.indent(body, ' ' * 8)}\n")
    space = {**globals(), "Base": base}
    exec(compile(file.read_text(), str(file), "exec"), space)
    torch.manual_seed(0)
    return space["Case"]().eval()


def kinds(module):
    """The uses that are worse than a call."""
    return {path: use.kind for path, use in uses_of_submodules(module).items() if use.kind}


def everything(module):
    return dict.fromkeys((name for name, _ in module.named_children()), EXPOSED)


class Opaque(nn.Module):
    """Only to be called."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        if name != "inner":
            raise AssertionError(f"{name} is read of a {type(self._modules['inner']).__name__}")
        return super().__getattr__(name)


def opaque(module):
    """A copy in which all submodules that are said to be only called can only be called."""
    twin = copy.deepcopy(module)
    for path in [path for path, use in uses_of_submodules(module).items() if use.kind is CALLED]:
        parent, _, name = path.rpartition(".")
        siblings = twin.get_submodule(parent)._modules
        siblings[name] = Opaque(siblings[name])
    return twin


def assert_runs_opaque(module, inputs):
    with torch.no_grad():
        assert torch.equal(module(inputs), opaque(module)(inputs))


def listed(path, **elements):
    return {path: LOOKED_AT, **{f"{path}.{name}": kind for name, kind in elements.items()}}


HARMLESS = [
    "return self.a(x)",
    "return self.act(self.seq(x)) * self.scale",
    "block = self.a; return block(x)",
    "first = second = self.a; return first(x) + second(x)",
    "return (self.a if self.flag else self.b)(x)",
    "block = self.a if x.sum() > 0 else self.b\nreturn block(x)",
    "if self.a is not None and self.none is None:\n    x = self.a(x)\nreturn x",
    "if self.a and not self.none:\n    x = self.a(x)\nreturn x",
    "while not self.a:\n    x = x + 1\nreturn self.a(x) if self.a else x",
    "return self.a(x) if hasattr(self, 'a') else x",
    "return getattr(self, 'a')(x) + getattr(self, 'other', self.b)(x)",
    "return (self.none or self.a)(x)",
    "assert self.a is not None, 'no block'\nreturn self.a(x)",
    "return x.to(next(self.parameters()).dtype).to(next(self.parameters()).device)",
    "assert isinstance(self, nn.Module) and type(self).__name__ == self.__class__.__name__\nreturn self.a(x)",
    "for block in (self.a, self.b):\n    x = block(x)\nreturn x",
    "return sum(block(x) for block in [self.a, self.b] if x.dim())",
    "def inner(y):\n    return self.a(y)\nreturn checkpoint(inner, x, use_reentrant=False)",
    "inner = lambda y: self.a(y)\nreturn inner(x)",
    "return self.step(x) + self.static(x)",
    "with torch.no_grad():\n    return self.a(x)",
    "try:\n    return self.a(x)\nexcept ValueError as error:\n    return x",
    "self.last = self.a(x)\nself.index += 1\nself.flag = False\nreturn self.last",
    "y: torch.Tensor = self.a(x)\nz, w = self.a(x), self.b(x)\nreturn y + z + w",
    "return x if self.conv is None else self.conv.weight",
    "return self.training * self.a(x=x)",
    "return self.seq(x) if self.flag else self.list",
]
LISTS = [
    ("for block in self.list:\n    x = block(x)\nreturn x", "list"),
    ("for i, block in enumerate(self.list):\n    x = block(x) + i\nreturn x", "list"),
    (
        "for i, (one, two) in enumerate(zip(self.list, self.seq)):\n    x = one(x) + two(x) + i\nreturn x",
        "list seq",
    ),
    (
        "for block, y in zip(reversed(self.list), [x, x], strict=True):\n    x = block(x) + y\nreturn x",
        "list",
    ),
    ("for i in range(len(self.list)):\n    x = self.list[i](x)\nreturn x", "list"),
    ("return self.list[0](x) + self.list[-1](x) + self.list[self.index](x)", "list"),
    ("for block in self.list[:-1]:\n    x = block(x)\nreturn x", "list"),
    ("return self.seq(x) + self.seq[:1](x)", "seq"),
    ("return torch.stack([block(x) for block in list(self.list)]).sum(0)", "list"),
    ("return sum({name: block(x) for name, block in self.dict.items()}.values())", "dict"),
    ("for block in self.dict.values():\n    x = block(x)\nreturn x", "dict"),
    ("return sum(self.dict[name](x) for name in ('x', 'y'))", "dict"),
    ("if self.list and len(self.dict):\n    x = self.list[0](x)\nreturn x", "list dict"),
    ("first, second = self.list\nreturn first(second(x))", "list"),
    ("for block in self.list[0], self.list[1]:\n    x = block(x)\nreturn x", "list"),
]


@pytest.mark.parametrize("body", HARMLESS)
def test_a_submodule_that_is_only_called_may_be_opaque(body, tmp_path):
    module = with_forward(body, tmp_path)
    if "self.list" in body:
        assert kinds(module) == {"list": EXPOSED}
        return
    assert kinds(module) == {}
    for inputs in (torch.ones(1, 2, 3, 3), -torch.ones(2, 2, 1, 1)):
        assert_runs_opaque(module, inputs)


@pytest.mark.parametrize(("body", "containers"), LISTS)
def test_elements_are_judged_one_by_one_and_their_container_stays(body, containers, tmp_path):
    module = with_forward(body, tmp_path)
    assert kinds(module) == dict.fromkeys(containers.split(), LOOKED_AT)
    elements = {path for path in uses_of_submodules(module) if "." in path}
    assert elements == {
        f"{one}.{name}" for one in containers.split() for name in getattr(module, one)._modules
    }
    assert_runs_opaque(module, torch.ones(1, 2, 3, 3))


@pytest.mark.parametrize("question", ["isinstance(self.seq, nn.Module)", "self.seq.training", "self.seq"])
def test_a_container_that_is_looked_at_has_its_elements_listed(question, tmp_path):
    module = with_forward(f"return self.seq(x) if {question} else x", tmp_path)
    uses = uses_of_submodules(module)
    assert [uses[name].kind for name in ("seq", "seq.0", "seq.1")] == [LOOKED_AT, CALLED, CALLED]


def test_containers_in_containers(tmp_path):
    body = "for stage in self.deep:\n    for block in stage:\n        x = block(x)\nreturn x"
    module = with_forward(body, tmp_path)
    assert kinds(module) == {"deep": LOOKED_AT, "deep.0": LOOKED_AT, "deep.1": LOOKED_AT}
    assert {"deep.0.0", "deep.0.1", "deep.1.0"} < uses_of_submodules(module).keys()
    assert_runs_opaque(module, torch.ones(1, 2, 3, 3))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return self.a(x) * self.a.heads", {"a": LOOKED_AT}),
        ("return self.a(x) * self.a.shape[0] * self.a.training", {"a": LOOKED_AT}),
        ("return self.a(x).to(self.a.kind) if self.a.none is None else x", {"a": LOOKED_AT}),
        ("return self.a(x) * getattr(self.a, 'heads', 1)", {"a": LOOKED_AT}),
        ("return self.a(x) if hasattr(self.a, 'absent') else x", {"a": LOOKED_AT}),
        ("return self.a(x) if isinstance(self.a, Block) else x", {"a": LOOKED_AT}),
        ("return self.a(x) if type(self.a) is Block else x", {"a": LOOKED_AT}),
        ("return self.look(x)", {"b": LOOKED_AT}),
        ("return super().forward(x)", {"b": LOOKED_AT}),
        ("return super(Case, self).forward(x)", {"b": LOOKED_AT}),
        ("return sum(f.heads * f(x) for f in self.list)", listed("list", **{"0": LOOKED_AT, "1": LOOKED_AT})),
        ("return self.list[0].heads * self.list[1](x)", listed("list", **{"0": LOOKED_AT, "1": LOOKED_AT})),
    ],
)
def test_a_submodule_whose_plain_data_is_read_has_to_stay(body, expected, tmp_path):
    module = with_forward(body, tmp_path)
    assert kinds(module) == expected
    assert_runs_opaque(module, torch.ones(1, 2, 3, 3))


@pytest.mark.parametrize(
    "body",
    [
        "return self.a.conv(x)",
        "return F.conv2d(x, self.a.conv.weight)",
        "return self.a.names",
        "return self.a.asked",
        "return hasattr(self.a, 'asked')",
        "return self.a.forward(x)",
        "return self.a.__call__(x)",
        "return self.a.__class__",
        "return self.a.state_dict()",
        "return checkpoint(self.a, x)",
        "return functools.partial(self.a, x)()",
        "return F.relu(x, inplace=self.a)",
        "return self.a",
        "return x, self.a",
        "yield self.a",
        "blocks = [self.a]\nreturn blocks[0](x)",
        "blocks = {'k': self.a}\nreturn blocks['k'](x)",
        "self.kept = self.a\nreturn x",
        "self.kept: nn.Module = self.a\nreturn x",
        "self.a = x",
        "self.a += x",
        "del self.a",
        "self.a.heads = 1",
        "del self.a.heads",
        "with x as self.a:\n    pass",
        "for self.a in x:\n    pass",
        "for i, y in enumerate(x, start=self.a):\n    pass",
        "x[0] = self.a",
        "x[self.a] = 1",
        "return x[self.a]",
        "return isinstance(x, self.a)",
        "return getattr(x, 'k', self.a).conv(x)",
        "return super(Block, self.a).forward(x)",
        "first, *rest = self.a, x\nreturn rest",
        "return f'{self.a}'",
        "print(self.a)",
        "return (lambda f=self.a: f(x))()",
        "return (lambda: self.a)()",
        "return self.a == x",
        "return self.a is x",
        "return x in self.a",
        "return self.a + x",
        "return [*self.a]",
        "return self.act(*self.a)",
        "if f := self.a:\n    return f(x)",
        "match self.a:\n    case block:\n        return block.conv.weight",
        "for y in self.a:\n    x = y(x)\nreturn x",
        "return self.a[0](x)",
        "return len(self.a)",
        "return [block for block in (self.a,)]",
        "block = None\nfor _ in x:\n    if block is not None:\n        x = block.conv(x)\n    block = self.a",
        "assert x, self.a",
        "raise self.a",
        "def inner(block=self.a):\n    return block\nreturn inner()",
        "return {self.a}",
    ],
)
def test_a_submodule_that_escapes_is_exposed(body, tmp_path):
    assert kinds(with_forward(body, tmp_path)) == {"a": EXPOSED}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return self.sized(x) if self.sized else x", {"sized": EXPOSED}),
        ("for y in self.sized:\n    x = y(x)\nreturn x", {"sized": EXPOSED}),
        ("one, two = self.a, self.b\nreturn one(two(x))", {"a": EXPOSED, "b": EXPOSED}),
        ("return self.decorated(x)", {"b": EXPOSED}),
        ("return x if self.ready else None", {"b": EXPOSED}),
        (
            "return Base.forward(self, x)",
            dict.fromkeys(("a", "b", "sized", "seq", "list", "dict", "deep"), EXPOSED),
        ),
        ("self.list.append(x)", {"list": EXPOSED}),
        ("self.list[0] = x", {"list": EXPOSED}),
        ("del self.list[0]", {"list": EXPOSED}),
        ("return x in self.dict", {"dict": EXPOSED}),
        ("return self.list", {"list": EXPOSED}),
        ("blocks = list(self.list)\nreturn blocks[0](x)", {"list": EXPOSED}),
        ("for name, block in self.seq.named_children():\n    x = block(x)", {"seq": EXPOSED}),
        ("for pair in zip(self.list, self.list):\n    x = pair[0](x)", {"list": EXPOSED}),
        (
            "for i, *rest in enumerate(self.list):\n    x = rest[0](x)",
            listed("list", **{"0": EXPOSED, "1": EXPOSED}),
        ),
        ("first, *rest = self.list\nreturn rest", listed("list", **{"0": EXPOSED, "1": EXPOSED})),
        ("for f in self.sized:\n    x = f(x)", {"sized": EXPOSED}),
        ("for f in self.list:\n    x = f.conv(x)", listed("list", **{"0": EXPOSED, "1": EXPOSED})),
        (
            "part = slice(1)\nfor f in self.list[part]:\n    x = f.conv(x)",
            listed("list", **{"0": EXPOSED, "1": EXPOSED}),
        ),
        (
            "for f in self.list:\n    x = f(x)\nreturn self.list",
            {"list": EXPOSED, "list.0": EXPOSED, "list.1": EXPOSED},
        ),
        (
            "part = slice(1)\nfor stage in self.deep[part]:\n    F.relu(stage)",
            listed("deep", **dict.fromkeys(("0", "1", "0.0", "0.1", "1.0"), EXPOSED)),
        ),
        ("return (self.a or self.b).conv(x)", {"a": EXPOSED, "b": EXPOSED}),
        ("return x if self.flag and self.list else None", {"list": LOOKED_AT}),
        ("for (one,) in zip(self.list, self.list):\n    x = one(x)", {"list": EXPOSED}),
        ("for self.a, f in enumerate(x):\n    pass", {"a": EXPOSED}),
        ("for self.a, f in x.items():\n    pass", {"a": EXPOSED}),
        ("for f in self.list[:1]:\n    x = f.conv(x)", listed("list", **{"0": EXPOSED, "1": EXPOSED})),
        (
            "for f in self.seq:\n    x = f.conv(x)\nreturn self.seq(x)",
            listed("seq", **{"0": EXPOSED, "1": EXPOSED}),
        ),
    ],
)
def test_other_escapes(body, expected, tmp_path):
    assert kinds(with_forward(body, tmp_path)) == expected


@pytest.mark.parametrize(
    "body",
    [
        "return F.relu(self)",
        "return self",
        "helper = self\nreturn [helper]",
        "return getattr(self, x)",
        "return getattr(self, f'a{x}')",
        "return [*self.modules()]",
        "return [*self.children()]",
        "for name, block in self.named_children():\n    x = block(x)",
        "for p in self.parameters():\n    x = x + p.sum()",
        "return next(self.parameters()).sum()",
        "return self.state_dict()",
        "return self._modules['a'](x)",
        "return self.__dict__",
        "return self.apply(print)",
        "return self.get_submodule('a')(x)",
        "self.eval()",
        "self.forward = x",
        "self.step = x",
        "return vars(self)",
        "return locals()",
        "return eval('self.a.conv.weight')",
        "global kept\nkept = x",
        "kept = x\ndef inner():\n    nonlocal kept\n    kept = x",
        "class Inner:\n    block = x",
        "return checkpoint(self.step, x)",
        "return self.step.__self__",
        "return map(self.step, [x])",
        "return super()",
        "return self.step.__func__",
        "for block in self:\n    x = block(x)",
        "return self[0]",
        "return f'{self}'",
        "return list(map(lambda module: module, [self]))",
        "return self.cached",
        "return sys._getframe().f_locals",
        "return self.__private",
        "with self:\n    pass",
        "next = print\nreturn next(self.parameters()).dtype",
    ],
)
def test_where_the_module_itself_escapes_everything_is_exposed(body, tmp_path):
    class Cached(Base):
        @functools.cached_property
        def cached(self):
            return self.a

    module = with_forward(body, tmp_path, Cached)
    assert kinds(module) == everything(module)


def test_parameters_of_several_dtypes_are_not_asked_for_one(tmp_path):
    module = with_forward("return x.to(next(self.parameters()).dtype)", tmp_path)
    module.b.double()
    assert kinds(module) == everything(module)


def test_parameters_by_a_method_of_its_own_are_not_asked(tmp_path):
    class Own(Base):
        def parameters(self, recurse=True):
            return super().parameters(recurse)

    module = with_forward("return x.to(next(self.parameters()).dtype)", tmp_path, Own)
    assert kinds(module) == everything(module)


def test_the_place_says_function_line_and_expression(tmp_path):
    module = with_forward("x = x + 1\nreturn checkpoint(self.a, x)", tmp_path)
    assert uses_of_submodules(module)["a"].where == "Case.forward (line 5: checkpoint(self.a, x))"
    assert uses_of_submodules(module)["b"].where == ""


def test_only_code_that_forward_can_reach_counts(tmp_path):
    class Unreached(Base):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.a.conv.weight)

        def extra_repr(self):
            return f"{self.a.conv}"

        def reset_parameters(self):
            for module in self.modules():
                print(module)

    assert kinds(with_forward("return self.a(x)", tmp_path, Unreached)) == {}
    module = with_forward("return self.a(self.extra_repr())", tmp_path, Unreached)
    assert kinds(module) == everything(module)


def hooked(module):
    module.register_forward_hook(lambda *_: None)


def replaced_forward(module):
    module.forward = lambda x: x


def bound_method(module):
    module.kept = module.step


def closure(module):
    module.kept = lambda x: x + module.a.conv(x)


def weak(module):
    module.kept = weakref.ref(module)


def hook_below(module):
    module.a.conv.register_forward_hook(lambda *_: print(module))


def cycle(module):
    del module.scale
    module.a.parent = module


@pytest.mark.parametrize("change", [hooked, replaced_forward, bound_method, closure, weak, hook_below, cycle])
def test_an_instance_that_can_reach_itself_exposes_everything(change, tmp_path):
    module = with_forward("return self.a(x)", tmp_path)
    change(module)
    assert kinds(module) == everything(module)


def in_list(module):
    module.kept = {"k": [(module.a,)]}


def method_of_submodule(module):
    module.kept = functools.partial(module.a.forward)


def part_in_list(module):
    module.kept = [module.a.conv]


def from_the_side(module):
    module.b.conv.kept = [module.a]


def tied(module):
    module.scale = module.a.conv.bias


@pytest.mark.parametrize("change", [in_list, method_of_submodule, part_in_list, from_the_side, tied])
def test_what_is_reached_past_the_module_tree_is_exposed(change, tmp_path):
    module = with_forward("return self.a(self.b(x))", tmp_path)
    change(module)
    assert kinds(module) == {"a": EXPOSED}


def test_a_submodule_may_hold_what_is_inside_it(tmp_path):
    module = with_forward("return self.a(x)", tmp_path)
    module.a.kept = [module.a.conv]
    module.kept = [Block()]
    module.register_load_state_dict_pre_hook(lambda *_: module)
    assert kinds(module) == {}


GLOBAL = []


def test_a_global_that_the_code_names_is_looked_into(tmp_path):
    module = with_forward("return GLOBAL[0].conv(x)", tmp_path)
    assert kinds(module) == {}
    GLOBAL.append(module.a)
    assert kinds(module) == {"a": EXPOSED}
    GLOBAL.clear()


def test_one_object_under_two_names_has_the_worse_use(tmp_path):
    for reading, kind in (("self.a.heads", LOOKED_AT), ("self.a.conv.bias.sum()", EXPOSED)):
        module = with_forward(f"return self.b(x) * {reading}", tmp_path)
        module.b = module.a
        assert kinds(module) == {"a": kind, "b": kind}


def test_what_shares_parts_with_an_exposed_submodule_is_exposed(tmp_path):
    module = with_forward("self.a.conv.bias.mul_(2)\nreturn self.b(self.seq(x))", tmp_path)
    module.b.conv.weight = module.a.conv.weight
    module.seq[0].conv = module.a.conv
    assert kinds(module) == {"a": EXPOSED, "b": EXPOSED, "seq": EXPOSED}


def test_what_contains_a_submodule_that_has_to_stay_has_to_stay_itself(tmp_path):
    module = with_forward("return self.seq(x) * self.a.heads", tmp_path)
    module.seq[0] = module.a
    assert kinds(module)["seq"] is EXPOSED


def forgetful(_):
    def wrapper(*args):
        return args[0].a.conv(args[1])

    return wrapper


def meddling(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return function(self, x) + self.a.conv(x)

    return wrapper


def passing(function):
    return function


@pytest.mark.parametrize(
    ("decorator", "all_exposed"),
    [
        ("torch.no_grad()", False),
        ("torch.jit.ignore", False),
        ("torch.inference_mode()", False),
        ("passing", False),
        ("forgetful", True),
        ("meddling", True),
        ("functools.lru_cache", True),
        ("contextlib.contextmanager", True),
    ],
)
def test_decorators_are_torchs_or_are_read(decorator, all_exposed, tmp_path):
    head = f"@{decorator}\n    def forward(self, x):"
    module = with_forward("return self.a(x)", tmp_path, head=head)
    assert kinds(module) == (everything(module) if all_exposed else {})


@pytest.mark.parametrize("head", ["def forward(*args):", "async def forward(self, x):"])
def test_functions_that_cannot_be_read_expose_everything(head, tmp_path):
    module = with_forward("return 1", tmp_path, head=head)
    assert kinds(module) == everything(module)


@pytest.mark.parametrize(
    "attribute",
    [
        "forward = lambda self, x: self.a(x)",
        "forward = torch.relu",
        "__getattr__ = lambda self, name: nn.Module.__getattr__(self, name)",
        "__call__ = lambda self, x: self.a.conv(x)",
    ],
)
def test_classes_with_other_means_expose_everything(attribute, tmp_path):
    module = with_forward("pass", tmp_path, head=f"{attribute}\n    def other(self):")
    assert kinds(module) == everything(module)


def test_source_that_is_missing_or_not_that_of_the_code_exposes_everything(tmp_path):
    module = with_forward("return self.a(x)", tmp_path)
    assert kinds(module) == {}
    file = tmp_path / inspect.getsourcefile(type(module).forward)
    file.write_text(file.read_text().replace("self.a(x)", "self.b(x)"))
    assert kinds(module) == everything(module)
    file.unlink()
    assert kinds(module) == everything(module)


class Falsy(Block):
    def __bool__(self):
        return False


class Dynamic(Block):
    def __getattr__(self, name):
        return super().__getattr__(name)


def test_a_question_is_harmless_only_where_it_runs_no_code_and_gives_plain_data(tmp_path):
    truth = with_forward("return self.a(x) if self.a else x", tmp_path)
    data = with_forward("return self.a(x) * self.a.heads", tmp_path)
    asked = with_forward("return self.a(x) * self.a.asked", tmp_path)
    truth.a, data.a, asked.a.__dict__["asked"] = Falsy(), Dynamic(), 1
    for module in (truth, data, asked):
        assert kinds(module) == {"a": EXPOSED}
    bias = with_forward("return self.a(x) if self.a.bias is None else x", tmp_path)
    for child, kind in ((nn.Conv2d(2, 2, 1), EXPOSED), (nn.Conv2d(2, 2, 1, bias=False), LOOKED_AT)):
        bias.a = child
        assert kinds(bias) == {"a": kind}


class Chain(nn.Sequential):
    def forward(self, x):
        for block in self:
            x = block(x)
        return x + self[0](x)


class Table(nn.ModuleDict):
    def forward(self, x):
        for name, block in self.items():
            x = block(x) * len(name)
        return x


class Looping(nn.Sequential):
    def __iter__(self):
        return iter([self.only.conv])


class Branching(nn.Module):
    """Calls by every way that is known to be harmless, on each branch other submodules."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = Block(), Block(), nn.Sequential(Block(), Block())
        self.levels = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])
        self.heads = nn.ModuleDict({"p": Block(), "q": Block()})
        self.shortcut = None

    @property
    def chosen(self):
        return [k for k, head in self.heads.items() if head is not None]

    def tail(self, x):
        return sum(self.heads[name](x) for name in self.chosen)

    def forward(self, x):
        x = self.stem(x)
        branch = self.one if x.sum() > 0 else self.two
        y = branch(x)
        for i, (level, scale) in enumerate(zip(self.levels, (2, 3), strict=True)):
            for block in reversed(level):
                y = block(y) * scale + i
        if x.shape[-1] > 2:
            y = self.tail(y) + (self.shortcut(x) if self.shortcut is not None else x)
        return y


@pytest.mark.parametrize(
    ("module", "called"),
    [
        (Chain(Block(), Block()), 2),
        (Table({"m": Block(), "nn": Block()}), 2),
        (nn.Sequential(Block(), nn.Sequential(Block())), 2),
        (nn.TransformerDecoderLayer(2, 1, 4, batch_first=True), 0),
        (Branching(), 8),
    ],
)
def test_called_submodules_may_be_opaque_on_every_branch(module, called):
    torch.manual_seed(1)
    module.eval()
    inputs = [torch.randn(1, 2, size, size) * 5 for size in (1, 2, 3, 4) for _ in range(4)]
    assert sum(use.kind is CALLED for use in uses_of_submodules(module).values()) >= called
    for x in inputs if called else ():
        assert_runs_opaque(module, x)
        assert kinds(module) == kinds(copy.deepcopy(module))  # also after its code has been run


def test_a_container_with_an_iteration_of_its_own_is_no_container(tmp_path):
    module = with_forward("for block in self.a:\n    x = block(x)\nreturn x", tmp_path)
    module.a = Looping()
    module.a.add_module("only", Block())
    assert uses_of_submodules(module)["a"].kind is EXPOSED


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("timm:efficientvit_m0", "stages.0.blocks.0.mixer.m", {"attn": LOOKED_AT}),
        ("timm:efficientvit_m0", "stages.0.blocks.0.mixer.m.attn", {"qkvs": LOOKED_AT, "dws": LOOKED_AT}),
        ("timm:efficientvit_b0", "stages.2.blocks.1.context_module.main", {"aggreg": LOOKED_AT}),
        ("timm:mobilevit_s", "stages.2.1", {}),
        ("timm:tiny_vit_5m_224", "stages.1.blocks.0", {}),
        ("timm:vgg11_bn", "pre_logits", {}),
        ("timm:vgg11_bn", "", {}),
        ("torchvision:retinanet_resnet50_fpn", "backbone", {}),
        ("torchvision:retinanet_resnet50_fpn", "backbone.body", {}),
        ("torchvision:fasterrcnn_resnet50_fpn", "", {"transform": EXPOSED}),
        ("torchvision:raft_small", "", {"corr_block": EXPOSED, "update_block": LOOKED_AT}),
        ("torchvision:raft_small", "feature_encoder", {}),
        ("torchvision:raft_small", "update_block", {}),
        ("torchvision:vit_b_16", "encoder.layers.encoder_layer_0.self_attention", {"out_proj": EXPOSED}),
    ],
)
def test_real_modules_that_no_trace_enters(name, path, expected):
    with torch.device("meta"):
        model = zoo.load(name).model
    assert kinds(model.get_submodule(path)) == expected
