"""Which norms of all timm and torchvision models go away: ``fxfuse`` beside ``torch.fx``'s own ``fuse``.

``--numbers`` instead runs a choice of folded models, in float64, beside their sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.utils import _pytree as pytree

import fxfuse
from benchmarks.families import (
    INT8,
    SIZES,
    Record,
    Size,
    build,
    build_without_memory,
    counted_norms,
    draw,
    first_line,
    images,
    is_norm,
    outputs,
    place,
    runnable,
    settle,
    smallest_size,
    specs,
    sweep,
)
from benchmarks.record import RESULTS, surroundings, write
from fxfuse.refusals import Code

COMMAND = "python -m benchmarks.reach"
CACHE = RESULTS.parents[1] / ".reach"
TOOLS = ("torch.fx", "fxfuse")
LIBRARIES = ("timm", "torchvision")
LIMITS = {"reach": 120.0, "numbers": 400.0}  # seconds for one model
ALLOWED = 1e-9
UNTRACED, UNCALLED = "error", "never called"
VERDICTS = ("exact", "inconclusive", "wrong", "not run")


def measure(spec: str) -> Record:
    """What both tools make of one model. A timm model without norms is counted, no more."""
    warnings.simplefilter("ignore")
    library, family = place(spec)
    try:
        model = build_without_memory(spec)
    except Exception as error:  # a third-party constructor, which may raise anything
        return {"library": library, "family": family, "failed": f"cannot be built: {first_line(error)}"}
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
        return {"removed": 0, "error": first_line(error), "clean": clean}
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
        return {"removed": 0, "error": first_line(error)}
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


def page(record: Record) -> str:
    """The results as a page for the documentation."""
    models = record["models"].values()
    built = [model for model in models if "fxfuse" in model]
    bare = [model for model in built if not model["norms"]]
    int8 = [m for name, m in record["models"].items() if name.endswith(INT8) and "fxfuse" in m]
    bugs = [model for model in built if not model["fxfuse"].get("clean", True)]
    failed = [f"  - `{name}`: {m['failed']}\n" for name, m in record["models"].items() if "failed" in m]
    return f"""# Which norms go away

Made by `{record["command"]}` {_made(record)}

All architectures of timm and torchvision, on the meta device, without example inputs: `fxfuse.explain`
beside `torch.fx.experimental.optimization.fuse`. A norm is a module of the source that is a batch norm,
torchvision's frozen one included. torch.fx has removed it if its result neither holds it nor calls
`F.batch_norm` in its place; fxfuse, if its report has it as folded and never as left. Norms that eval mode
never calls are in neither result: they count as removed by torch.fx, not by fxfuse. A model is free of norms
if its result calls none. On the meta device no norm is left for the values of weights (FXF4xx). Whether the
outputs stay the same is the matter of `{COMMAND} --numbers`.

![Share of norms removed, by library and family](reach.svg)

{table(_total_rows(record["totals"]))}
- Without a norm: {record["without_norms"]} more architectures of timm, {len(bare)} models of torchvision.
- fxfuse raises on {_raises(bare)} of the latter.
- Quantised models (`{INT8}`): {len(int8)}, of which fxfuse raises on {_raises(int8)}.
- Errors that are not fxfuse's own: {len(bugs)}.
- Models that could not be measured: {len(failed)}.
{"".join(failed)}
## What stands between fxfuse and 100 %

{table(_reason_rows(models))}
## Families on which fxfuse raises

{table(_error_rows(models))}
## Families

{table(_family_rows(models))}"""


def _total_rows(totals: Mapping[str, Record]) -> Iterator[list[object]]:
    yield ["library", "models", "norms", "tool", "norms removed", "models free of norms", "raises on models"]
    for library, total in totals.items():
        for tool in TOOLS:
            found = total[tool]
            share = f"{found['removed']:,} ({percent(found['removed'], total['norms'])})"
            norms = f"{total['norms']:,}"
            yield [library, total["models"], norms, tool, share, found["free"], found["raises"]]


def _reason_rows(models: Iterable[Record]) -> Iterator[list[object]]:
    meanings = {code.value.code: code.value.reason for code in Code} | {
        UNTRACED: "fxfuse raises an error, below",
        UNCALLED: "eval mode never calls it (auxiliary heads)",
    }
    yield ["code", "norms", "reason", "families"]
    for code, families in obstacles(models).items():
        yield [code, f"{families.total():,}", meanings.get(code, ""), _listed(families)]


def _error_rows(models: Iterable[Record]) -> Iterator[list[object]]:
    yield ["library", "family", "models", "norms", "error of the first"]
    for family, members in by_family(models).items():
        raised = [model for model in members if "error" in model["fxfuse"]]
        if raised:
            norms = sum(model["norms"] for model in raised)
            yield [*family, len(raised), f"{norms:,}", raised[0]["fxfuse"]["error"].partition(". ")[0]]


def _family_rows(models: Iterable[Record]) -> Iterator[list[object]]:
    yield ["library", "family", "models", "norms", *TOOLS, "left by fxfuse"]
    for family, members in by_family(models).items():
        total = summary(members)
        shares = [percent(total[tool]["removed"], total["norms"]) for tool in TOOLS]
        left = Counter({code: families.total() for code, families in obstacles(members).items()})
        yield [*family, total["models"], f"{total['norms']:,}", *shares, _listed(left)]


def _raises(models: Iterable[Record]) -> int:
    return sum("error" in model["fxfuse"] for model in models)


def percent(part: int, whole: int) -> str:
    """Rounded down: 100.0 % is all of them."""
    return f"{math.floor(1000 * part / whole) / 10:.1f} %" if whole else "-"


def table(rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first row is the head. A head alone is no table."""
    head, *body = rows
    if not body:
        return "None.\n"
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def _listed(counts: Counter[str], most: int = 12) -> str:
    named = [f"{name} {count:,}" for name, count in (+counts).most_common(most)]
    more = len(+counts) - most
    return ", ".join([*named, *([f"{more} more"] if more > 0 else [])])


def _made(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"at commit {record['commit']}: {versions}."


def picture(record: Record, file: Path, most: int = 25) -> None:
    """Draws the share of norms that each tool removes: both libraries, and the families with most norms."""
    rows = [(f"all of {library}", total) for library, total in record["totals"].items()]
    families = by_family(record["models"].values())
    names = Counter(family for _, family in families)
    for (library, family), members in list(families.items())[:most]:
        rows += [(f"{family} ({library})" if names[family] > 1 else family, summary(members))]
    overall = len(record["totals"])
    at = [row if row < overall else row + 0.6 for row in range(len(rows))]
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "reach", "font.size": 9})
    figure = Figure(figsize=(7.5, 0.28 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for tool, offset, colour in (("torch.fx", -0.19, "#E69F00"), ("fxfuse", 0.19, "#0072B2")):
        shares = [100 * total[tool]["removed"] / total["norms"] for _, total in rows]
        bars = axes.barh([y + offset for y in at], shares, height=0.36, color=colour, label=tool)
        labels = [percent(total[tool]["removed"], total["norms"]) for _, total in rows[:overall]]
        labels += [""] * (len(rows) - overall)
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(at, [f"{name}   {total['norms']:,}" for name, total in rows])
    axes.set(xlim=(0, 109), ylim=(max(at) + 0.6, -0.6), xticks=range(0, 101, 20))
    axes.set_xlabel("norms removed, in % of those that the models hold (beside the names)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)


def choose(models: Mapping[str, Record], count: int) -> list[str]:
    """Models under 40 M parameters in which norms are folded: the smallest of every family, then the next."""
    fit = [name for name, model in models.items() if _is_fit(model)]
    families = defaultdict(list)
    for name in sorted(fit, key=lambda name: (models[name]["parameters"], name)):
        families[models[name]["library"], models[name]["family"]].append(name)
    rounds = zip_longest(*(families[family] for family in sorted(families)))
    return [name for taken in rounds for name in taken if name][:count]


def _is_fit(model: Record) -> bool:
    return bool(model.get("norms") and model["parameters"] < 40e6 and model["fxfuse"].get("folded"))


def check(spec: str) -> Record:
    """Source and result of one model, on the same images in float64."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            model = build(spec).double()
            draw(model)
            source = runnable(spec, model)
            size = smallest_size(spec, source)
            settle(source, images(spec, 3, size))
            fused = fxfuse.fuse(model)
            found = _compared(spec, size, source, runnable(spec, fused))
    except Exception as error:  # third-party models are built and run, and may raise anything
        return {"verdict": "not run", "why": first_line(error)}
    report = fxfuse.report(fused)
    folds = {"norms": report.norms, "folded": len(report.folded), "size": size}
    return {**folds, **found, "seconds": round(time.perf_counter() - start, 1)}


def _compared(spec: str, size: Size, model: nn.Module, fused: nn.Module) -> Record:
    inputs = [images(spec, batch, size) for batch in (1, 3)]
    norms = counted_norms(model)
    calls: list[None] = []
    hooks = [norm.register_forward_hook(lambda *_: calls.append(None)) for norm in norms]
    expected = outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    called = {"called": len(calls) // len(inputs)}
    try:
        actual = outputs(fused, inputs)
    except Exception as error:  # the source took these inputs
        return {**called, "verdict": "wrong", "why": f"the result raises {first_line(error)}"}
    nudged = outputs(model, pytree.tree_map(lambda image: image * (1 + 1e-15), inputs[:1]))
    other_images = outputs(model, [images(spec, 1, size)])
    for norm in norms:
        norm.get_buffer("running_var").mul_(1.01)
    other_norms = outputs(model, inputs[:1])
    return {**called, **judged(expected, actual, nudged, {"images": other_images, "norms": other_norms})}


def judged(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    nudged: Sequence[Tensor],
    changed: Mapping[str, Sequence[Tensor]],
) -> Record:
    """Whether both models' outputs are the same to 1e-9, and whether a mistake could have been seen at all.

    The other arguments hold the source's first outputs once more: `nudged`, when the image differs by 1e-15;
    `changed`, when something differs that has to move them by a thousand times what is allowed.
    """
    if [a.shape for a in expected] != [b.shape for b in actual]:
        return {"verdict": "wrong", "why": "the outputs have other shapes"}
    sizes = [float(a.abs().amax()) for a in expected]
    allowed = [ALLOWED * max(1.0, size) for size in sizes]
    distances = [_distance(a, b) for a, b in zip(expected, actual, strict=True)]
    relative = max(distance / (size or 1) for distance, size in zip(distances, sizes, strict=True))
    record: Record = {"relative": relative if math.isfinite(relative) else None}
    if not all(map(math.isfinite, sizes)):
        return {**record, "verdict": "inconclusive", "why": "the source's outputs are not finite"}
    if not all(distance <= most for distance, most in zip(distances, allowed, strict=True)):
        own = max(_distance(a, c) / (size or 1) for a, c, size in zip(expected, nudged, sizes, strict=False))
        verdict = "inconclusive" if own > 0.01 * relative else "wrong"
        why = f"relative difference {relative:.0e}; {own:.0e} from itself when the image differs by 1e-15"
        return {**record, "verdict": verdict, "why": why}
    for what, others in changed.items():
        effects = (_distance(a, c) for a, c in zip(expected, others, strict=False))
        if not all(effect >= 1000 * most for effect, most in zip(effects, allowed, strict=False)):
            return {**record, "verdict": "inconclusive", "why": f"an output is the same for other {what}"}
    return {**record, "verdict": "exact"}


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).abs().amax())


def numbers_page(record: Record) -> str:
    """The comparison of numbers as a page for the documentation."""
    models = {
        name: {"verdict": "not run", "why": m.get("failed"), **m} for name, m in record["models"].items()
    }
    run = [model for model in models.values() if "size" in model]
    verdicts = Counter(model["verdict"] for model in models.values())
    sides = ", ".join(str(side) for side, _ in SIZES)
    heads = ["models", "families", "norms folded", *VERDICTS, "worst relative difference", "time"]
    families = len({place(name) for name in models})
    minutes = f"{sum(model['seconds'] for model in run) / 60:.0f} min of one core"
    found = [verdicts[verdict] for verdict in VERDICTS]
    strange = [
        f"- `{name}` calls {model['called']} norms, fxfuse lists {model['norms']}\n"
        for name, model in models.items()
        if "size" in model and model["called"] != model["norms"]
    ]
    others = [[f"`{name}`", m["verdict"], m["why"]] for name, m in models.items() if m["verdict"] != "exact"]
    return f"""# Whether the numbers stay the same

Made by `{record["command"]}` {_made(record)}

Models with less than 40 M parameters in which fxfuse folds norms, the smallest of each family first. Weights
are random, statistics of norms are those of three random images, each disturbed. Source and result are run
in float64 on 1 and on 3 random images or clips of the smallest size of {sides} that the
model takes, else of its own size. Of detectors only the backbone is run.

- *exact*: in every output max |a − b| ≤ 10⁻⁹ · max(1, max |a|);
- *inconclusive*: an output is not finite; or other images, or variances of the norms that are 1 % larger,
  change it by less than a thousand times what is allowed; or it is not exact, but the source itself moves by
  more than a hundredth of that when its image changes by 10⁻¹⁵.

{table([heads, [len(models), families, _folds(run), *found, _worst(run), minutes]])}
In {len(run) - len(strange)} of {len(run)} models fxfuse lists as many norms as a run calls.
{"".join(strange)}
## Not exact

{table([["model", "found", "why"], *others])}
## Families

{table(_number_rows(models))}"""


def _number_rows(models: Mapping[str, Record]) -> Iterator[list[object]]:
    families: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for name, model in models.items():
        families[place(name)].append(model)
    yield ["library", "family", "models", "norms folded", "image side", "found", "worst relative difference"]
    for family, members in sorted(families.items()):
        found = _listed(Counter(model["verdict"] for model in members))
        sides = ", ".join(str(side) for side in sorted({m["size"][0] for m in members if "size" in m}))
        yield [*family, len(members), _folds(members), sides, found, _worst(members)]


def _folds(models: Iterable[Record]) -> str:
    counts = [(model["folded"], model["norms"]) for model in models if "norms" in model]
    return f"{sum(folded for folded, _ in counts):,} of {sum(norms for _, norms in counts):,}"


def _worst(models: Iterable[Record]) -> str:
    return f"{max((model['relative'] or 0.0 for model in models if 'relative' in model), default=0.0):.0e}"


def identity() -> tuple[Record, str]:
    """Where this runs, and a digest of the code and versions with which it does: results are kept by it."""
    where = surroundings(COMMAND)
    root = RESULTS.parents[1]
    files = [*sorted(root.glob("fxfuse/**/*.py")), Path(__file__), root / "benchmarks" / "families.py"]
    code = [json.dumps(where["versions"]), *(file.read_text() for file in files)]
    return where, hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def main() -> None:
    """Measures, prints the page and writes it beside the numbers."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--numbers", action="store_true", help="compare outputs instead of counting norms")
    parser.add_argument("--models", type=int, default=220, help="how many to compare with --numbers")
    parser.add_argument(
        "--only", metavar="PATTERN", help="models with this in their names; nothing is written"
    )
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run has done")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    where, code = identity()
    what = "numbers" if options.numbers else "reach"
    if options.restart:
        (CACHE / f"{what}-{code}.jsonl").unlink(missing_ok=True)
    try:
        models = sweep(
            measure, specs(options.only or ""), CACHE / f"reach-{code}.jsonl", limit=LIMITS["reach"]
        )
        if options.numbers:
            chosen = choose(models, options.models)
            models = sweep(check, chosen, CACHE / f"numbers-{code}.jsonl", limit=LIMITS["numbers"])
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    record = {**where, "command": COMMAND + " --numbers" * options.numbers}
    record |= {"models": models} if options.numbers else reach_record(models)
    text = numbers_page(record) if options.numbers else page(record)
    print(text)
    if options.only:
        return
    if identity()[1] != code:
        sys.exit("the code was changed meanwhile; nothing is written")
    write(what, record, text)
    if not options.numbers:
        picture(record, RESULTS / "reach.svg")


if __name__ == "__main__":
    main()
