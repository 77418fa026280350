"""Table, JSON and plot of the cells that are finished. What was not run is said to be not run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.recover.rows import ROWS
from benchmarks.recover.settings import Setting

STEP = 16 * 256
"""Tokens of the steps of the source that compute is counted in."""
NOT_RUN = "not run"


def finished(file: Path) -> list[dict[str, Any]]:
    """Records of the cells that are done; of a cell that was run twice the last."""
    lines = file.read_text().splitlines() if file.is_file() else []
    records = (json.loads(line) for line in lines)
    return list({(each["row"], each["seed"], each["budget"]): each for each in records}.values())


def spread(values: Sequence[float]) -> str:
    """Mean, and smallest and largest where there are several seeds."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} (1 seed)" if len(values) < 2 else f"{mean} ({min(values):.3f} .. {max(values):.3f}, {len(values)})"


def table(setting: Setting, records: Sequence[Mapping[str, Any]], source: Mapping[str, float]) -> str:
    """Markdown: a row of ROWS in a line, a budget in a column."""
    budgets = sorted(setting.budgets)
    longest = budgets[-1]
    titles = ["recipe", "as pruned", *(f"{budget:,} tokens" for budget in budgets), "above the source", "cost"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    missing = []
    for name, row in ROWS.items():
        own = [each for each in records if each["row"] == name]
        if not own:
            missing.append(f"`{name}`")
            continue
        at = {budget: [each for each in own if each["budget"] == budget] for budget in budgets}
        done = at[longest]
        cells = [f"`{name}`: {row.label}", f"{statistics.mean(each['pruned'] for each in done or own):.3f}"]
        cells += [spread([each["loss"] for each in at[budget]]) if at[budget] else NOT_RUN for budget in budgets]
        cells.append(f"{statistics.mean(each['loss'] for each in done) - source['mean']:.3f}" if done else "")
        cells.append(f"{statistics.mean(each['source_tokens'] for each in done) / STEP:.0f}" if done else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    return "\n".join(lines)


def plot(setting: Setting, records: Sequence[Mapping[str, Any]], source: Mapping[str, float], path: Path) -> None:
    """Loss against tokens at the longest budget: mean of the seeds, and from the least to the largest of them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    longest = max(setting.budgets)
    names = [name for name in ROWS if any(each["row"] == name and each["budget"] == longest for each in records)]
    for number, name in enumerate(names):
        curves = [each["curve"] for each in records if each["row"] == name and each["budget"] == longest]
        tokens = [at["tokens"] / 1e6 for at in curves[0]]
        losses = list(zip(*([at["loss"] for at in curve] for curve in curves), strict=True))
        means = [statistics.mean(each) for each in losses]
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "."}
        axis.plot(tokens, means, label=f"{ROWS[name].label}: {means[-1]:.3f}", **style)
        axis.fill_between(tokens, [min(each) for each in losses], [max(each) for each in losses], alpha=0.15)
    axis.axhline(source["mean"], color="black", linewidth=1, label=f"source: {source['mean']:.3f}")
    axis.set(xlabel="tokens of training, millions (masks included)", ylabel="loss, nats a token")
    axis.set_ylim(source["mean"] - 0.1, source["mean"] + 2.4)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def write(setting: Setting, root: Path, results: Path) -> str:
    """Write ``recover.json`` and ``recover-<setting>.png`` of what is finished to ``results``; returns the table."""
    records, source = finished(root / "cells.jsonl"), json.loads((root / "source.json").read_text())
    text = table(setting, records, source)
    results.mkdir(parents=True, exist_ok=True)
    file = results / "recover.json"
    parts = json.loads(file.read_text()) if file.is_file() else {}
    order = list(ROWS)
    parts[setting.name] = {
        "machine": common.machine(), "target": dict(setting.target), "source": source,
        "cells": sorted(records, key=lambda each: (-each["budget"], order.index(each["row"]), each["seed"])),
    }  # fmt: skip
    file.write_text(json.dumps(parts, indent=1) + "\n")
    plot(setting, records, source, results / f"recover-{setting.name}.png")
    return text
