"""Which norms of a model go away, by fxfuse and by torch.fx, and the totals over many models."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.fx.experimental import optimization

import fxfuse
from benchmarks.families import (
    Record,
    build_without_memory,
    is_norm,
    place,
)
from fxfuse.errors import with_type

TOOLS = ("torch.fx", "fxfuse")
LIBRARIES = ("timm", "torchvision")
UNTRACED, UNCALLED = "error", "never called"


def measure(spec: str) -> Record:
    """What both tools make of one model. A timm model without norms is counted, no more."""
    warnings.simplefilter("ignore")
    library, family = place(spec)
    try:
        model = build_without_memory(spec)
    except Exception as error:  # a third-party constructor, which may raise anything
        return {"library": library, "family": family, "failed": f"cannot be built: {with_type(error)}"}
    record = {
        "library": library,
        "family": family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "norms": len(_norms(model)),
    }
    if library == "timm" and not record["norms"]:
        return record
    return {**record, "fxfuse": by_fxfuse(model), "torch.fx": by_torch_fx(model)}


def _norms(model: nn.Module) -> set[int]:
    return {id(module) for module in model.modules() if is_norm(module)}


def by_fxfuse(model: nn.Module) -> Record:
    """Norm modules that are folded wherever they are called, those left by code, and those never called."""
    norms = _norms(model)
    try:
        report = fxfuse.explain(model)
    except Exception as error:  # any but fxfuse's own is a bug, and to be found here
        clean = isinstance(error, fxfuse.FxfuseError)
        return {"removed": 0, "error": with_type(error), "clean": clean}
    ids = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    left = {ids.get(refusal.norm): refusal.code for refusal in report.refused}
    folded = {ids.get(fold.norm) for fold in report.folded} & norms - left.keys()
    return {
        "removed": len(folded),
        "left": Counter(code for norm, code in left.items() if norm in norms),
        "never_called": len(norms - folded - left.keys()),
        "executed": report.norms,
        "folded": len(report.folded),
        "refused": Counter(refusal.code for refusal in report.refused),
    }


def by_torch_fx(model: nn.Module) -> Record:
    """Norm modules that are gone: neither a module of the result nor inlined in it as a function."""
    norms = len(_norms(model))
    try:
        result = optimization.fuse(model)
    except Exception as error:  # the model's own code is run, and torch.fx raises anything
        return {"removed": 0, "error": with_type(error)}
    assert isinstance(result, torch.fx.GraphModule)
    inlined = [node for node in result.graph.nodes if node.target is nn.functional.batch_norm]
    return {"removed": norms - min(norms, len(_norms(result)) + len(inlined))}


def reach_record(models: Mapping[str, Record]) -> Record:
    """All models but timm's without norms, and the totals by library."""
    shown = {name: model for name, model in models.items() if "fxfuse" in model or "failed" in model}
    members = {
        library: [model for name, model in shown.items() if place(name)[0] == library]
        for library in LIBRARIES
    }
    totals = {library: summary(found) for library, found in members.items() if found}
    return {"without_norms": len(models) - len(shown), "totals": totals, "models": shown}


def summary(models: Iterable[Record]) -> Record:
    """How many models and norms; by tool: norms removed, models made free of norms, models it raises on."""
    counted = [model for model in models if model.get("norms")]
    result: Record = {"models": len(counted), "norms": sum(model["norms"] for model in counted)}
    for tool in TOOLS:
        result[tool] = {
            "removed": sum(model[tool]["removed"] for model in counted),
            "free": sum(_is_free(model, tool) for model in counted),
            "raises": sum("error" in model[tool] for model in counted),
        }
    return result


def _is_free(model: Record, tool: str) -> bool:
    return bool(model[tool]["removed"] + model[tool].get("never_called", 0) == model["norms"])


def by_family(models: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The models with norms by library and family; those with most norms first."""
    families = defaultdict(list)
    for model in models:
        if model.get("norms"):
            families[model["library"], model["family"]].append(model)
    return dict(sorted(families.items(), key=lambda item: -sum(model["norms"] for model in item[1])))


def obstacles(models: Iterable[Record]) -> dict[str, Counter[str]]:
    """Norms that fxfuse leaves, by the code of the reason and by family."""
    left: dict[str, Counter[str]] = defaultdict(Counter)
    for model in models:
        if model.get("norms"):
            reasons = model["fxfuse"].get("left", {UNTRACED: model["norms"]})
            never = {UNCALLED: model["fxfuse"].get("never_called", 0)}
            for code, norms in {**reasons, **never}.items():
                left[code][model["family"]] += norms
    return {code: +left[code] for code in sorted(left, key=lambda code: -left[code].total()) if +left[code]}
