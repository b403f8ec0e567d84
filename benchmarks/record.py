"""Where a measurement was made: versions and machine, to stand beside its numbers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "docs" / "results"
# What torch's kernels use of the processor, such as AVX2 or AVX512.
INSTRUCTIONS = torch.backends.cpu.get_cpu_capability()
_CODE = ("fxfuse", "benchmarks", "constraints.txt")  # a result that was written before does not matter


def surroundings(command: str) -> dict[str, Any]:
    """The command, the commit, the versions and the machine."""
    packages = ("fxfuse", "torch", "torchvision", "timm", "onnxruntime", "openvino", "aimet-torch", "torchao")
    installed = {each.name.lower() for each in importlib.metadata.distributions()}
    return {
        "command": command,
        "commit": _git("describe", "--always") + ("-dirty" if _git("status", "--porcelain", *_CODE) else ""),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages if name in installed},
        "machine": {
            "processor": f"{_processor()}, {INSTRUCTIONS}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write(name: str, record: dict[str, Any], page: str) -> None:
    """Writes ``docs/results/NAME.json`` and the page made from it, ``docs/results/NAME.md``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    (RESULTS / f"{name}.md").write_text(page)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
