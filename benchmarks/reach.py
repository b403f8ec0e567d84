"""Which norms of all timm and torchvision models go away: ``fxfuse`` beside ``torch.fx``'s own ``fuse``.

``--numbers`` instead runs a choice of folded models, in float64, beside their sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings

from benchmarks.counting import measure, reach_record
from benchmarks.families import Record, specs, sweep
from benchmarks.numbers import check, choose
from benchmarks.pages import numbers_page, page, picture
from benchmarks.record import RESULTS, surroundings, write

COMMAND = "python -m benchmarks.reach"
CACHE = RESULTS.parents[1] / ".reach"
LIMITS = {"reach": 120.0, "numbers": 400.0}  # seconds for one model


def identity() -> tuple[Record, str]:
    """Where this runs, and a digest of the code and versions with which it does: results are kept by it."""
    where = surroundings(COMMAND)
    root = RESULTS.parents[1]
    own = [root / "benchmarks" / f"{name}.py" for name in ("reach", "counting", "numbers", "families")]
    files = [*sorted(root.glob("fxfuse/**/*.py")), *own]
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
