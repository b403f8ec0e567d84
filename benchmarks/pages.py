"""The results of counting and comparing as pages and a picture."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.counting import TOOLS, UNCALLED, UNTRACED, by_family, obstacles, summary
from benchmarks.families import (
    INT8,
    SIZES,
    Record,
    place,
)
from benchmarks.numbers import VERDICTS
from fxfuse.refusals import Code


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
if its result calls none. On the meta device no norm is left for the values of weights (FXF4xx). Percentages
are rounded down. Whether the outputs stay the same is the matter of `{record["command"]} --numbers`.

![Share of norms removed, by library and family](reach.svg)

{table(_total_rows(record["totals"]))}
- Without a batch norm: {record["without_norms"]} more architectures of timm, {len(bare)} of torchvision.
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
