"""What every benchmark needs: alternating repetitions, medians, peak memory, results with the machine beside them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor and versions; no names or paths."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = {line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(models)) or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def alternate(cases: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each case; the cases take turns, so that a noisy machine is noisy to all."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in tqdm(range(warmup + repeats), desc="repetitions"):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_rss(process: int | str = "self") -> int:
    """Peak resident memory of a program, bytes. Not getrusage's: that starts at the size of the parent process."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def save(name: str, result: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` with the machine beside the numbers."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def save_part(name: str, part: str, result: dict[str, Any]) -> Path:
    """Write one part of ``results/<name>.json``, with its own machine; the parts of other runs stay."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    parts = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**parts, part: {"machine": machine(), **result}}, indent=1) + "\n")
    return path
