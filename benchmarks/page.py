"""How long the HTML report takes to make and to open, in Debian's chromium.

Made with ``fxfuse.publish``, once before it is measured. Opened from a file, in a fresh tab each time; the
time is that from the start of the navigation to the end of the load event, as the browser tells it, and to
the first frame that is drawn after that.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from rich.progress import track

import fxfuse
from benchmarks.record import surroundings, write
from fxfuse import zoo
from fxfuse.page import Subject
from fxfuse.publish import publish

MODELS = ("resnet18", "densenet121", "resnet152")
COMMAND = "python -m benchmarks.page"
_LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
_DRAWN = "new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"


def measure(name: str, rounds: int, browser: Browser) -> dict[str, Any]:
    """Everything about one model."""
    loaded = zoo.load(f"torchvision:{name}")
    fused = fxfuse.fuse(loaded.model, example_inputs=loaded.inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.html")
        made = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            publish(Subject(name, loaded.weights), loaded.model, fused, loaded.inputs, html_file=file)
            made.append(time.perf_counter() - start)
        opened = [_opened(browser, file) for _ in range(rounds + 1)]
        seconds = {"make": made[1:], "load": [o[0] for o in opened[1:]], "draw": [o[1] for o in opened[1:]]}
        return {
            "norms": fxfuse.report(fused).norms,
            "kib": file.stat().st_size / 1024,
            "seconds": seconds,
            "median": {kind: statistics.median(taken) for kind, taken in seconds.items()},
        }


def _opened(browser: Browser, file: Path) -> tuple[float, float]:
    """Seconds until the page is loaded, and until it is drawn."""
    tab = browser.new_page()
    tab.goto(file.as_uri())
    drawn = tab.evaluate(_DRAWN)
    loaded = tab.evaluate(_LOADED)
    tab.close()
    return loaded / 1000, drawn / 1000


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    rows = [
        [name, m["norms"], f"{m['kib']:.0f} KiB", *(f"{m['median'][kind]:.2f} s" for kind in m["median"])]
        for name, m in record["models"].items()
    ]
    table = [["model", "norms", "size", "make", "load", "draw"], ["---"] * 6, *rows]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    return f"""# How long the HTML report takes

Made by `{record["command"]}` at commit {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions},
Chromium {record["chromium"]}, headless.

Medians of {record["rounds"]} rounds. *make*: drawing, counting and writing, which runs the source twice and
the folded model once; folding and verifying come before it. *load*: from the start of the navigation to the
end of the load event; *draw*: until the first frame after it. The load average of the machine was
{record["load_average"]:.1f} when this began: what it had besides is in these times.

""" + "".join(f"| {' | '.join(map(str, row))} |\n" for row in table)


def main() -> None:
    """Measures, prints the page and writes it beside the numbers."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each page is made and opened")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write nothing")
    options = parser.parse_args()
    load_average = os.getloadavg()[0]
    chromium = shutil.which("chromium") or parser.error("there is no chromium (apt-get install chromium)")
    warnings.simplefilter("ignore")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = track(MODELS, description="measuring", disable=not sys.stderr.isatty())
        models = {name: measure(name, options.rounds, browser) for name in shown}
        version = browser.version
    browsed = {"chromium": version, "load_average": load_average}
    record = {**surroundings(COMMAND), **browsed, "rounds": options.rounds, "models": models}
    print(page(record))
    if not options.dry_run:
        write("page", record, page(record))


if __name__ == "__main__":
    main()
