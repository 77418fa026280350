"""Plots beside the JSON of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import RESULTS


def plot_lines(
    name: str, xs: Sequence[float], lines: Mapping[str, Sequence[float]], x: str, y: str, title: str = ""
) -> Path:
    """Draw lines over common ``xs`` into ``results/<name>.png``. Needs matplotlib, of the dev extra."""
    return plot_panels(name, {title: (x, xs, lines)}, y)


def plot_panels(
    name: str, panels: Mapping[str, tuple[str, Sequence[float], Mapping[str, Sequence[float]]]], y: str
) -> Path:
    """Panels side by side: title -> (name of x, xs, lines)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(1 + 4.5 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (title, (x, xs, lines)) in zip(axes[0], panels.items(), strict=True):
        for label, values in lines.items():
            axis.plot(xs, values, marker="o", label=label)
        axis.set(xlabel=x, title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(y)
    axes[0][0].legend()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path
