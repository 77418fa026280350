"""One picture of an evaluation: quality against size, and against speed. A point is a model, with standard errors."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from llmshearing.evaluate.lm_eval_tasks import need

BEST = ("acc_norm", "acc")
"""Metrics that stand for a task, the first that it has."""
Point = tuple[float, float, float | None]


def quality(model: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Axis -> (value, standard error): bits per byte (or loss), and the mean accuracy over tasks."""
    found: dict[str, tuple[float, float | None]] = {}
    if "loss" in model:
        every = model["loss"]["all"]
        if every["bits_per_byte"] is not None:
            found["bits per byte (less is better)"] = (every["bits_per_byte"], None)
        else:
            found["nats per token (less is better)"] = (every["loss"], every["loss_stderr"])
    entries = [next((task[name] for name in BEST if name in task), None) for task in model.get("tasks", {}).values()]
    if scores := [entry for entry in entries if entry is not None]:
        stderr = sum((entry["stderr"] or 0.0) ** 2 for entry in scores) ** 0.5 / len(scores)
        found[f"mean accuracy of {len(scores)} tasks"] = (statistics.mean(e["value"] for e in scores), stderr)
    return found


def cost(model: dict[str, Any]) -> dict[str, float]:
    """Axis -> value."""
    speed = {f"{phase} tokens/s": each["tokens_per_second"] for phase, each in model.get("speed", {}).items()}
    return {"parameters": model["parameters"], **{name: speed[name] for name in ("decode tokens/s",) if name in speed}}


def plot(result: dict[str, Any], path: Path) -> bool:
    """Draw; whether there was something to draw (an empty file otherwise).

    Raises:
        ShearingError: matplotlib is not installed.
    """
    models = result["models"]
    rows = list(dict.fromkeys(name for model in models for name in quality(model)))
    columns = list(dict.fromkeys(name for model in models for name in cost(model)))
    need("matplotlib", what="plots")
    from matplotlib.figure import Figure  # not pyplot, whose state outlives us

    figure = Figure(figsize=(5 * len(columns), 4 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots(max(1, len(rows)), len(columns), squeeze=False)
    for place, row in zip(axes, rows or [""], strict=True):
        for axis, column in zip(place, columns, strict=True):
            axis.set(xlabel=column, ylabel=row)
            axis.margins(0.2)
            for model in models:
                if row in quality(model) and column in cost(model):
                    (y, stderr), x = quality(model)[row], cost(model)[column]
                    axis.errorbar(x, y, yerr=stderr, fmt="s" if model["is_source"] else "o", capsize=3)
                    axis.annotate(model["name"], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    figure.savefig(path, format="png", dpi=120)
    return True
