"""Plots of fitted target losses and of a simulated mixture; needs matplotlib (`pip install 'llmshearing[plot]'`).

python -m llmshearing.data.plots simulation.png      what update_type and its options do to the mixture
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmshearing.commands import parser, run
from llmshearing.data.mixture.mixture import update_proportion
from llmshearing.errors import ShearingError
from llmshearing.files import whole

log = logging.getLogger(__name__)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ImportError:
        raise ShearingError("a plot needs matplotlib: pip install 'llmshearing[plot]'") from None
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def plot_fits(
    path: Path,
    names: Sequence[str],
    sizes: Sequence[float],
    losses: np.ndarray,
    curves: Sequence[tuple[float, float, float]],
    parameters: float,
) -> None:
    """One panel a domain: measured losses [M, K], the curve loss(N) = a N^-b + c, and the target at `parameters`."""
    figure, panels = _figure(-(-len(names) // 3), min(3, len(names)))
    grid = np.geomspace(min(*sizes, parameters) / 1.5, max(*sizes, parameters) * 1.5, 200)
    for panel, name, column, (a, b, c) in zip(panels[: len(names)], names, losses.T, curves, strict=True):
        panel.plot(grid, a * grid**-b + c, label=f"{a:.3g} N^-{b:.3g} + {c:.3g}")
        panel.plot(sizes, column, "o", label="measured")
        panel.plot([parameters], [a * parameters**-b + c], "*", markersize=12, label="target")
        panel.set(xscale="log", title=name, xlabel="parameters", ylabel="loss, nats per token")
        panel.legend(fontsize="small")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {"update_type": "constant"},
    "doremi": {"update_type": "doremi"},
    "doremi, eta 0.3": {"update_type": "doremi", "eta": 0.3},
    "doremi, clamp_excess": {"update_type": "doremi", "clamp_excess": True},
}


def simulate(evaluations: int = 40, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(proportions, losses), each [evaluations, 3], of domains that recover at different speed when trained on.

    A domain's loss falls towards its floor in proportion to what is seen of it: a toy, to show the update's workings.
    """
    proportion, target = np.array([0.6, 0.3, 0.1]), np.array([2.0, 1.8, 1.2])
    losses, floor, speed = np.array([3.0, 2.6, 2.4]), target - np.array([0.1, 0.2, 0.0]), np.array([0.3, 0.6, 0.5])
    history = []
    for _ in range(evaluations):
        history.append((proportion, losses))
        losses = floor + (losses - floor) * np.exp(-speed * proportion)
        proportion = update_proportion(proportion=proportion, losses=losses, target_loss=target, **options)
    return np.array([q for q, _ in history]), np.array([x for _, x in history])


def plot_simulation(path: Path) -> None:
    """Above the proportions, below the excess losses, one column for each of SETTINGS."""
    figure, panels = _figure(2, len(SETTINGS))
    for i, (title, options) in enumerate(SETTINGS.items()):
        proportions, losses = simulate(**options)
        for domain, label in enumerate(("large, slow", "middle, fast", "small, far")):
            panels[i].plot(proportions[:, domain], label=label)
            panels[i + len(SETTINGS)].plot(losses[:, domain] - [2.0, 1.8, 1.2][domain], label=label)
        panels[i].set(title=title, ylim=(0, 1), ylabel="proportion")
        panels[i + len(SETTINGS)].set(xlabel="evaluations", ylabel="loss - target", ylim=(-0.3, 1.3))
        panels[i + len(SETTINGS)].axhline(0, color="grey", linewidth=0.8)
    panels[0].legend(fontsize="small")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    prog = "python -m llmshearing.data.plots"
    options = parser(prog, "Plot a simulated mixture under each update of its proportions.", f"{prog} simulation.png")
    options.add_argument("file", type=Path, help="PNG to write")
    file = options.parse_args(argv).file

    def command() -> int:
        plot_simulation(file)
        log.info("wrote the plot to %s", file)
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
