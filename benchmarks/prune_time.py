"""How long one-shot pruning takes beside reading and writing the files, and how much memory.

    python -m benchmarks.prune_time --source DIR --calibration DATA [--methods random ...] [--samples 64]

Each method runs in a process of its own, so that its peak memory is its own. Seconds are the command's own, from its
start to the written directory; "files" is safetensors reading the source and writing it again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.common import save

FILES = "files"
CASES = {
    "random": ["random"],
    "depth influence": ["depth", "--by", "influence"],
    "vocabulary": ["vocabulary"],
    "activation": ["activation"],
    "obs": ["obs"],
}


def files(source: Path, folder: Path) -> float:
    """Seconds to read a model's tensors and to write them."""
    start = time.perf_counter()
    for file in source.glob("*.safetensors"):
        save_file(load_file(file), folder / file.name)
    return time.perf_counter() - start


def pruned(label: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the command reports of itself."""
    command = [*CASES[label], "--model", options.source, "--output", folder / "out", "--ratio", options.ratio]
    if label == "vocabulary":
        command += ["--frequencies", options.frequencies]
    elif label != "random":
        command += ["--calibration", options.calibration, "--samples", options.samples]
        command += ["--report_samples", options.report_samples, "--max_seq_len", options.max_seq_len]
    done = subprocess.run(
        [sys.executable, "-m", "llmshearing.prune", *map(str, command)], capture_output=True, text=True, check=True
    )
    record = json.loads((folder / "out" / "prune.json").read_text())
    last = {line.split("  ")[0]: line.split()[-1] for line in done.stderr.splitlines() if line.strip()}
    return {
        "seconds": float(last["seconds"]),
        "peak_memory": int(last["peak memory, bytes"].replace(",", "")),
        "perplexity": [record[side]["perplexity"] for side in ("before", "after")],
        "parameters": [record[side]["parameters"] for side in ("before", "after")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, type=Path, help="Hugging Face directory")
    parser.add_argument("--calibration", required=True, help="JSONL, text or MDS")
    parser.add_argument("--frequencies", help="token counts of the vocabulary method, as JSON")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), help="(all)")
    parser.add_argument("--ratio", type=float, default=0.2, help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--report_samples", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--max_seq_len", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--output", default="prune_time", help="name under benchmarks/results (%(default)s)")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        rows[FILES] = {"seconds": files(options.source, Path(name))}
    for label in options.methods:
        with tempfile.TemporaryDirectory() as name:
            rows[label] = pruned(label, options, Path(name))
    settings = {key: getattr(options, key) for key in ("ratio", "samples", "report_samples", "max_seq_len")}
    print(f"{'':18}{'seconds':>9}{'peak GB':>9}  parameters, perplexity before -> after")
    for label, row in rows.items():
        memory = f"{row['peak_memory'] / 1e9:9.2f}" if "peak_memory" in row else ""
        change = f"  {row['parameters']} {row['perplexity']}" if "parameters" in row else ""
        print(f"{label:18}{row['seconds']:9.1f}{memory}{change}")
    print(f"wrote {save(options.output, {'settings': settings, 'rows': rows})}")


if __name__ == "__main__":
    main()
