"""A run's record as figures: series of numbers, as the page's script draws them. Plain data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmshearing.report.read import Run
from llmshearing.report.record import plain

MOST = 400
"""Points of a line on the page: more are drawn as means of neighbours."""
Pair = tuple[float, float]
OBJECTIVES = ("cross_entropy", "divergence", "hidden")
"""Parts of the training loss that are in nats or of their size; see `training/callbacks/losses.py`."""
KNOWN = ("loss/train/", "pruning/")


def figure(title: str, unit: str, series: Sequence[dict[str, Any] | None], x: str = "batch") -> dict[str, Any] | None:
    """Axes and lines; None where there is nothing to draw. unit: of the vertical axis."""
    drawn = [each for each in series if each is not None]
    return {"title": title, "unit": unit, "x": x, "series": drawn} if drawn else None


def line(name: str, pairs: Iterable[Pair], color: int = 0, dash: bool = False) -> dict[str, Any] | None:
    """A line of a figure; None without points. color: number in the page's palette."""
    points = thinned([(x, y) for x, y in pairs if y is not None])
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    return {"name": name, "x": plain(list(xs)), "y": plain(list(ys)), "color": color, "dash": dash}


def thinned(points: Sequence[Pair]) -> list[Pair]:
    """At most MOST points: means of runs of neighbours; the first and the last are what they were."""
    if len(points) <= MOST:
        return list(points)
    inner = points[1:-1]
    edges = [len(inner) * at // (MOST - 2) for at in range(MOST - 1)]
    means = [
        (statistics.fmean(x for x, _ in run), statistics.fmean(y for _, y in run))
        for run in (inner[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True))
    ]
    return [points[0], *means, points[-1]]


def values(run: Run, name: str, axis: str = "batch") -> list[Pair]:
    """(batch or tokens, value) of a metric, over the steps that have it."""
    return [(step[axis], step["values"][name]) for step in run.steps.values() if step["values"].get(name) is not None]


def names(run: Run, prefix: str) -> list[str]:
    """What follows a prefix in the names of the recorded metrics, in the order of their appearance."""
    every = dict.fromkeys(name for step in run.steps.values() for name in step["values"])
    return [name.removeprefix(prefix) for name in every if name.startswith(prefix)]


def speed(run: Run, axis: str = "batch") -> list[Pair]:
    """(batch or tokens, tokens/s) between one recorded step and the next."""
    steps = list(run.steps.values())
    pairs = zip(steps[:-1], steps[1:], strict=True)
    return [
        (now[axis], (now["tokens"] - before["tokens"]) / now["seconds"])
        for before, now in pairs
        if now["seconds"] and now["tokens"] > before["tokens"]
    ]


def figures(run: Run) -> list[dict[str, Any]]:
    """All figures of one run."""
    found = [*_shape(run), *_losses(run), *_data(run), *_others(run)]
    return [each for each in found if each is not None]


def _shape(run: Run) -> list[dict[str, Any] | None]:
    kinds = names(run, "pruning/open_units/")
    drawn = [
        figure(
            f"Open units: {kind}",
            "units a row",
            [
                line("wanted", values(run, f"pruning/wanted_units/{kind}"), 7, dash=True),
                line("expected", values(run, f"pruning/open_units/{kind}"), 0),
            ],
        )
        for kind in kinds
    ]
    drawn.append(
        figure(
            "Parameters that the masks count",
            "parameters",
            [
                line("at the end", values(run, "pruning/target_parameters"), 7, dash=True),
                line("expected", values(run, "pruning/expected_parameters"), 0),
            ],
        )
    )
    for number in (1, 2):
        prefix = f"pruning/lambda_{number}/"
        lines = [line(kind, values(run, prefix + kind), at) for at, kind in enumerate(names(run, prefix))]
        drawn.append(figure(f"Lagrangian multipliers λ{'₁₂'[number - 1]}", "", lines))
    return drawn


def _losses(run: Run) -> list[dict[str, Any] | None]:
    prefix = "loss/train/"
    told = names(run, prefix)
    domains = [name for name in told if name not in (*OBJECTIVES, "lagrangian")]
    by_domain = dict.fromkeys(name for each in run.evaluations.values() for name in each["domains"])
    evaluated = list(run.evaluations.values())
    means = (
        line("mean", [(each["batch"], each["loss"]) for each in evaluated], 7, dash=True)
        if len(by_domain) != 1
        else None
    )
    return [
        figure(
            "Loss in training",
            "nats per token",
            [line(name.replace("_", "-"), values(run, prefix + name), at) for at, name in enumerate(OBJECTIVES)],
        ),
        figure(
            "Loss at evaluations",
            "nats per token",
            [
                line(name, [(each["batch"], each["domains"].get(name)) for each in evaluated], at)
                for at, name in enumerate(by_domain)
            ]
            + [means],
        ),
        figure(
            "Loss in training, by domain",
            "nats per token",
            [line(name, values(run, prefix + name), at) for at, name in enumerate(domains)],
        ),
        figure("Penalty", "", [line("penalty", values(run, f"{prefix}lagrangian"))]),
    ]


def _data(run: Run) -> list[dict[str, Any] | None]:
    domains = dict.fromkeys(name for each in run.evaluations.values() for name in each["mixture"])
    shares = [
        line(name, [(each["batch"], each["mixture"].get(name)) for each in run.evaluations.values()], at)
        for at, name in enumerate(domains)
    ]
    return [figure("Mixture of the data", "share", shares), figure("Speed", "tokens/s", [line("training", speed(run))])]


def _others(run: Run) -> list[dict[str, Any] | None]:
    """What no figure above shows, by what the names begin with."""
    groups: dict[str, list[str]] = {}
    for name in names(run, ""):
        if not name.startswith(KNOWN):
            groups.setdefault(name.rpartition("/")[0] or name, []).append(name)
    return [
        figure(group, "", [line(name.rpartition("/")[2], values(run, name), at) for at, name in enumerate(found)])
        for group, found in groups.items()
    ]


def compared(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The same figure of several runs in one, over tokens where all of them count these."""
    axis = "tokens" if all(step["tokens"] for run in runs for step in run.steps.values()) else "batch"

    def each(title: str, unit: str, pairs: Callable[[Run], list[Pair]]) -> dict[str, Any] | None:
        return figure(title, unit, [line(run.name, pairs(run), at) for at, run in enumerate(runs)], axis)

    kinds = dict.fromkeys(kind for run in runs for kind in names(run, "pruning/open_units/"))
    found = [
        each(
            "Loss at evaluations",
            "nats per token",
            lambda run: [(e[axis], e["loss"]) for e in run.evaluations.values()],
        ),
        each("Loss in training", "nats per token", lambda run: values(run, "loss/train/cross_entropy", axis)),
        each("Speed", "tokens/s", lambda run: speed(run, axis)),
        each("Expected parameters", "parameters", lambda run: values(run, "pruning/expected_parameters", axis)),
    ]
    for kind in kinds:
        found.append(
            each(f"Open units: {kind}", "units a row", lambda run, k=kind: values(run, f"pruning/open_units/{k}", axis))  # type: ignore[misc]
        )
    return [one for one in found if one is not None]


def outcome(run: Run) -> dict[str, Any]:
    """Name -> last figures of a run, to be compared with others."""
    found: dict[str, Any] = {"kind": run.kind, "batches": run.last_batch or None}
    if run.steps:
        last = list(run.steps.values())[-1]
        found["tokens"] = last["tokens"]
    if rates := [rate for _, rate in speed(run)]:
        found["tokens/s, median"] = statistics.median(rates)
    if losses := [value for _, value in values(run, "loss/train/cross_entropy")][-10:]:
        found["loss in training, mean of the last 10"] = statistics.fmean(losses)
    if run.evaluations:
        newest = list(run.evaluations.values())[-1]
        found["loss at the last evaluation"] = newest["loss"]
        found |= {f"loss: {name}": loss for name, loss in newest["domains"].items()}
    return found
