"""Which architectures run on the kernels of the engine "torch", and how much faster: one model of a family.

Families are those of timm and torchvision with batch norms (``docs/results/reach.json``), of which the
smallest model is taken, and some without. Each is drawn, folded and lowered, with two images and with nine,
which may be cut in slices; of a detector the backbone. What is counted is what ``lowered.lowering`` says,
with the errors against float64. The folded module and the program are called in turns. One thread for each
of two processes; a model whose process dies is named.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import geometric_mean

import torch

import fxfuse
from benchmarks.families import INT8, Record, images, place, prepared, sweep
from benchmarks.pages import table
from benchmarks.record import RESULTS, surroundings, write
from fxfuse.errors import with_type
from fxfuse.lowering.timing import medians

COMMAND = "python -m benchmarks.lowerable"
CACHE = RESULTS.parents[1] / ".reach"
BATCHES = (2, 9)
LIMIT = 600.0  # seconds for one model
# Families without batch norms, whose blocks are of another kind.
WITHOUT = ("convnextv2_atto", "gmlp_s16_224", "mixer_s32_224", "resmlp_12_224", "swinv2_tiny_window8_256")


def measure(spec: str) -> Record:
    """How one model is lowered, by batch."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            _, source, size = prepared(spec)
            folded = fxfuse.fuse(source.float())
            inputs = [tuple(image.float() for image in images(spec, batch, size)) for batch in BATCHES]
            folded(*inputs[0])
    except Exception as error:  # third-party models are built and run, and may raise anything
        return {"failed": with_type(error)}
    lowered = {str(batch): fxfuse.lower(folded, given) for batch, given in zip(BATCHES, inputs, strict=True)}
    found: Record = {"size": size} | {batch: each.lowering.to_dict() for batch, each in lowered.items()}
    for (batch, each), given in zip(lowered.items(), inputs, strict=True):
        if not each.lowering.reason:
            calls = {"folded": partial(folded, *given), "lowered": partial(each, *given)}
            with torch.no_grad():
                found[batch]["milliseconds"] = medians(calls, rounds=5, pause=0.0)
    return found


def smallest() -> list[str]:
    """The model with the fewest parameters of each family."""
    families: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name, model in json.loads((RESULTS / "reach.json").read_text())["models"].items():
        if model.get("norms") and INT8 not in name:
            families.setdefault(place(name), []).append((model["parameters"], name))
    return [*(min(members)[1] for members in families.values()), *(f"timm:{name}" for name in WITHOUT)]


def page(record: Record) -> str:
    """The results as a page for the documentation."""
    models: Mapping[str, Record] = record["models"]
    lowered = {
        batch: [
            name for name, model in models.items() if str(batch) in model and not model[str(batch)]["reason"]
        ]
        for batch in BATCHES
    }
    counts = "".join(f"- {batch} images: {len(names)} of {len(models)}\n" for batch, names in lowered.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""# Which architectures run on oneDNN's kernels

Made by `{COMMAND}` at {record["commit"]}: {record["machine"]["processor"]}, {versions}.

The smallest model of each family of timm and torchvision that has batch norms, and some without, with random
weights, folded and lowered by `fxfuse.lower` for the engine "torch" on a CPU: in how many the program
answers, after it was compared with the folded module. With nine images it may be one for slices of the batch.
Of a detector the backbone is taken.

{counts}
## How much faster

The folded module's time over the program's, medians of five calls of each, in turns, on one thread while
another model is measured beside; mostly with images of 64 pixels.

{table(_speedups(models))}
## Where the folded module answers, and why

{table(_others(models))}"""


def _speedups(models: Mapping[str, Record]) -> Iterator[list[object]]:
    """How many times as fast: the geometric mean, and the least of all."""
    yield ["images", "geometric mean", "the least"]
    for batch in BATCHES:
        times = {name: model.get(str(batch), {}).get("milliseconds") for name, model in models.items()}
        ratios = sorted((each["folded"] / each["lowered"], name) for name, each in times.items() if each)
        least = ", ".join(f"{name} {ratio:.2f}" for ratio, name in ratios[:8])
        yield [batch, f"{geometric_mean(ratio for ratio, _ in ratios):.2f}", least]


def _others(models: Mapping[str, Record]) -> Iterator[list[object]]:
    yield ["model", "images", "reason"]
    for name, model in models.items():
        if "failed" in model:
            yield [name, "", model["failed"]]
        for batch in BATCHES:
            if model.get(str(batch), {}).get("reason"):
                yield [name, batch, model[str(batch)]["reason"]]


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="", help="models with this in their names")
    options = parser.parse_args()
    where = surroundings(COMMAND)
    names = [name for name in smallest() if options.only in name]
    try:
        models = sweep(measure, names, CACHE / f"lowerable-{where['commit']}.jsonl", limit=LIMIT)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    record = {**where, "models": models}
    if options.only:
        print(page(record))
    else:
        write("lowerable", record, page(record))


if __name__ == "__main__":
    main()
