"""The data flows one way, and so do the imports."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fxfuse"
# By their names in it: keep, lowering.onednn.
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

# Each module may import from those on the lines above it only.
LAYERS = [
    ["held"],
    ["_version", "errors", "refusals", "tree", "replica", "calls", "functions", "places", "geometry"],
    ["channels", "files", "visible", "vetting", "container"],
    ["objects", "explanations", "arguments", "affine", "distances", "verdict", "archive", "checkpoint"],
    ["contents", "options", "methods"],
    ["guards"],
    ["proxies", "reparametrized", "exposure", "fold", "records", "layers", "constants"],
    ["kernels"],
    ["runs", "inputs", "precision"],
    ["algebra", "rounding", "structure"],
    ["transparent", "patterns", "comparison", "reports"],
    ["table", "nodes", "summary"],
    ["aliases", "forms"],
    ["tracer"],
    ["capture"],
    ["lifting"],
    ["arithmetic"],
    ["ops"],
    ["shapes", "maps"],
    ["layout", "memory", "plan", "merging", "eager"],
    ["linearity", "solve", "leave"],
    ["mergeable"],
    ["apart"],
    ["branches"],
    ["match", "check", "inline", "dynamo"],
    ["planner"],
    ["following"],
    ["rewrite"],
    ["lowering.__init__", "lowering.purity", "lowering.timing", "lowering.records"],
    ["lowering.lock", "lowering.numbers", "lowering.leaves"],
    ["lowering.traces", "lowering.specialised"],
    ["lowering.specialise", "lowering.kept"],
    ["lowering.allocator", "lowering.attention"],
    ["lowering.dtypes", "lowering.channels_last"],
    [
        "lowering.halves",
        "lowering.operands",
        "lowering.reuse",
        "lowering.legal",
        "lowering.concatenations",
        "lowering.inductor",
        "lowering.onnxruntime",
    ],
    ["lowering.torchscript"],
    ["lowering.onednn", "lowering.openvino", "lowering.cudnn"],
    ["lowering.batches"],
    ["lowering.engines"],
    ["lowering.cuda_graphs"],
    ["lowering.candidates"],
    ["lowering.pairs"],
    ["lowering.slices"],
    ["lowering.compilation"],
    ["lowering.lowered"],
    ["lowering.auto", "lowering.dynamo"],
    ["lowering.lower"],
    ["program", "backend"],
    ["drawing"],
    ["dot", "picture"],
    ["page"],
    ["publish"],
    ["exchange"],
    ["unit"],
    ["keep"],
    ["pipeline", "programs"],
    ["criteria"],
    ["resuming"],
    ["culprits"],
    ["reproduction"],
    ["__init__"],
    ["zoo"],
    ["demo"],
    ["render"],
    ["shell"],
    ["cli"],
    ["__main__"],
]

# What a stage of the design knows nothing of.
IGNORANT = {
    "fold": {"capture", "ops", "match", "rewrite", "nodes", "shapes", "solve", "keep"},
    "comparison": {"fold", "match", "rewrite", "affine", "solve", "keep", "pipeline"},
    "rounding": {"fold", "match", "rewrite", "affine", "solve", "keep", "pipeline"},
    "algebra": {"fold", "match", "rewrite", "affine", "solve", "keep", "pipeline"},
    "structure": {"fold", "match", "rewrite", "affine", "solve", "keep", "pipeline"},
    "lowering.numbers": {"comparison", "fold", "match", "rewrite", "pipeline"},
    "check": {"capture", "match", "rewrite", "keep"},
    "records": {"capture", "ops", "match", "rewrite", "fold", "solve", "keep"},
    "ops": {"capture", "match", "rewrite", "fold", "affine", "shapes", "solve", "keep"},
    "table": {"ops", "nodes", "shapes", "match", "fold", "affine", "capture"},
    "transparent": {"ops", "nodes", "shapes", "match", "fold", "affine", "capture"},
    "shapes": {"capture", "match", "fold", "affine", "rewrite"},
    "match": {"capture", "fold", "affine", "rewrite", "solve", "keep"},
    "solve": {"capture", "match", "rewrite", "keep"},
    "rewrite": {"fold", "affine", "match", "keep"},
    "keep": {"fold", "affine", "match", "solve", "rewrite"},
    "lowering.compilation": {"capture", "ops", "match", "fold", "affine", "solve", "rewrite", "pipeline"},
    "lowering.lower": {"capture", "ops", "match", "fold", "affine", "solve", "rewrite", "pipeline"},
    "exposure": {"capture", "ops", "match", "fold", "affine"},
    "lifting": {"ops", "match", "fold", "affine", "solve", "rewrite"},
    "page": {"capture", "ops", "match", "fold", "rewrite", "pipeline"},
    "dot": {"capture", "ops", "match", "fold", "rewrite", "pipeline"},
    "drawing": {"match", "fold", "affine", "solve", "rewrite"},
    "reports": {"capture", "ops", "match", "fold", "solve", "rewrite"},
    "program": {"match", "fold", "affine", "dynamo", "backend"},
    "following": {"capture", "match", "fold", "affine", "rewrite"},
    "inline": {"match", "fold", "affine", "rewrite", "backend"},
    "dynamo": {"match", "fold", "affine", "rewrite", "program"},
    "backend": {"match", "fold", "affine", "solve", "program"},
}


def imports_of(module: str) -> set[str]:
    tree = ast.parse(MODULES[module].read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module in ("fxfuse", "fxfuse.lowering") else {node.module}
    inside = {name.removeprefix("fxfuse.") for name in found if name.startswith("fxfuse.")}
    return inside & MODULES.keys() | ({"__init__"} if "fxfuse" in found else set())


def test_every_module_has_its_layer():
    layered = [module for layer in LAYERS for module in layer]
    assert sorted(layered) == sorted(MODULES)


def test_imports_point_downwards_only():
    below: set[str] = set()
    for layer in LAYERS:
        for module in layer:
            assert imports_of(module) <= below, module
        below |= set(layer)


def test_stages_do_not_know_what_the_design_keeps_from_them():
    for module, unknown in IGNORANT.items():
        assert not imports_of(module) & unknown, module


def test_no_package_is_needed_that_is_not_declared():
    """Others, numpy too, may be imported in functions, by those who have them."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]} | {"fxfuse"}
    for path in MODULES.values():
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            needed = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert needed <= declared, path.name


def test_numpy_need_not_be_installed():
    """torch goes on without it."""
    program = """
import sys
sys.modules["numpy"] = None
import torch, fxfuse
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
x = torch.randn(2, 3, 8, 8)
fused = fxfuse.fuse(model, example_inputs=(x,))
fxfuse.verify(model, fused, (x,)).raise_if_failed()
assert not fxfuse.lower(fused, (x,)).lowering.reason
print(fxfuse.bisect(model, lambda each: each is not None and "1" in dict(each.named_children())))
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0 and ran.stdout, ran.stderr
