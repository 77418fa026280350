"""OBS by block elimination against the same rounds with the Hessian inverted again in each: time and agreement.

    python -m benchmarks.obs [--hidden 1024] [--intermediate 2816] [--output benchmarks/results/obs.json]

One down projection with correlated inputs, float32; repetitions of both forms alternate in one process, and the inverse
that both start from is in both times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshearing.prune.methods.obs.linalg import damped_inverse, remove_units, shrinking_groups, unit_scores
from llmshearing.prune.methods.obs.method import LARGEST, SMALLEST

PERCDAMP = 0.01


def problem(hidden: int, intermediate: int) -> tuple[Tensor, Tensor]:
    """Weight [hidden, intermediate], and H [intermediate, intermediate] of twice as many tokens with mixed channels."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(intermediate, 64, generator=generator)
    inputs = torch.randn(intermediate, 2 * intermediate, generator=generator)
    inputs += common @ torch.randn(64, 2 * intermediate, generator=generator) / 8
    inputs *= torch.rand(intermediate, 1, generator=generator)
    return torch.randn(hidden, intermediate, generator=generator), 2 * inputs @ inputs.T


def by_elimination(weight: Tensor, hessian: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    return remove_units(weight, damped_inverse(hessian, PERCDAMP), remove, largest=LARGEST, smallest=SMALLEST)


def by_inverting_again(weight: Tensor, hessian: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    """The same rounds; the columns that are left are inverted anew for each."""
    damped = hessian + PERCDAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
    units = torch.arange(weight.shape[1])
    weight = weight.clone()
    for size in shrinking_groups(remove, LARGEST, SMALLEST):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[units][:, units]))
        gone = unit_scores(weight[:, units], inverse).argsort(stable=True)[:size].sort().values
        factor = torch.linalg.cholesky(inverse[gone][:, gone])
        weight[:, units] -= weight[:, units[gone]] @ torch.cholesky_solve(inverse[gone], factor)
        weight[:, units[gone]] = 0
        keep = torch.ones(len(units), dtype=torch.bool)
        keep[gone] = False
        units = units[keep]
    return units, weight


def compare(weight: Tensor, hessian: Tensor, ratio: float, repeats: int) -> dict[str, Any]:
    remove = round(ratio * weight.shape[1])
    seconds: dict[str, list[float]] = {"elimination": [], "inverting_again": []}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(repeats):
        for name, method in (("elimination", by_elimination), ("inverting_again", by_inverting_again)):
            start = time.perf_counter()
            results[name] = method(weight, hessian, remove)
            seconds[name].append(time.perf_counter() - start)
    errors = {name: ((new - weight) @ hessian * (new - weight)).sum().item() for name, (_, new) in results.items()}
    same = set(results["elimination"][0].tolist()) & set(results["inverting_again"][0].tolist())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ratio": ratio,
        "removed": remove,
        "rounds": len(list(shrinking_groups(remove, LARGEST, SMALLEST))),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "times_faster": round(median["inverting_again"] / median["elimination"], 2),
        "kept_by_both": len(same) / (weight.shape[1] - remove),
        "largest_weight_difference": (results["elimination"][1] - results["inverting_again"][1]).abs().max().item(),
        "calibration_error_of_elimination_over_the_other": errors["elimination"] / errors["inverting_again"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/obs.json"))
    args = parser.parse_args()
    weight, hessian = problem(args.hidden, args.intermediate)
    runs = [compare(weight, hessian, ratio, args.repeats) for ratio in (0.25, 0.5)]
    record = {
        "hidden": args.hidden,
        "intermediate": args.intermediate,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "runs": runs,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    for run in runs:
        print(f"{run['ratio']:.0%}: {run['times_faster']} times faster in {run['rounds']} rounds")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
