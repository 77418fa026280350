"""Target losses for `callbacks.data_loading.target_loss` (the command is `llmshearing.utils.target_loss`).

Either the losses of the source model itself, from an evaluation; or those that a model of the target's size would
have, from losses of models of several sizes of one family, as Sheared LLaMA does (arXiv:2310.06694, section 2.2),
by fitting for each domain

    loss(N) = a N^-b + c,   a >= 0, b > 0, c >= 0,   N in parameters

Shapes: M models, K domains; losses [M, K] in nats per token.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmshearing.data.json_file import read_json
from llmshearing.errors import ShearingError

EXPONENTS = np.geomspace(1e-3, 3, 400)  # searched for b; 0.34 for Chinchilla (arXiv:2203.15556)
LARGEST = 1e300  # of a size or a loss: JSON spells whole numbers that no float holds
REFINEMENTS = 4  # narrowings of that search, each by a factor of 100


def fit(parameters: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, c) of least squares: for every b on a grid, a and c in closed form; the grid is narrowed around the best.

    Needs three sizes. Raises ShearingError for fewer, for values that are no positive numbers, and where the losses
    do not fall with size.
    """
    sizes, values = np.asarray(parameters, np.float64), np.asarray(losses, np.float64)
    if len(set(sizes.tolist())) < 3 or len(sizes) != len(values):
        raise ShearingError(f"a fit of three numbers needs losses of at least 3 sizes; there are {sizes.tolist()}")
    if not (np.isfinite(sizes) & np.isfinite(values) & (sizes > 0) & (values > 0)).all():
        raise ShearingError(f"sizes {sizes.tolist()} and losses {values.tolist()} must be positive numbers")
    scaled = sizes / sizes.max()  # keeps N^-b near 1
    grid = EXPONENTS
    for _ in range(REFINEMENTS):
        solutions = [_linear(scaled, values, b) for b in grid]
        best = int(np.argmin([error for error, _, _ in solutions]))
        low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
        b, (_, a, c) = float(grid[best]), solutions[best]
        grid = np.geomspace(low, high, 200)
    if a <= 0:
        raise ShearingError(f"the losses {values.tolist()} do not fall with the sizes {sizes.tolist()}")
    return float(a * sizes.max() ** b), b, float(c)


def _linear(sizes: np.ndarray, losses: np.ndarray, b: float) -> tuple[float, float, float]:
    """(squared error, a, c) for a given b, with c >= 0 and a >= 0."""
    power = sizes**-b
    spread = power - power.mean()
    a = float((spread * losses).sum() / max((spread**2).sum(), 1e-300))
    c = float(losses.mean() - a * power.mean())
    if c < 0:
        a, c = float((power * losses).sum() / (power**2).sum()), 0.0
    if a < 0:
        a, c = 0.0, float(losses.mean())
    return float(((a * power + c - losses) ** 2).sum()), a, c


def predict(curve: tuple[float, float, float], parameters: float) -> float:
    """loss(N) of a fitted curve."""
    a, b, c = curve
    return a * parameters**-b + c


def source_losses(path: Path, set_names: Sequence[str]) -> list[float]:
    """Losses [K] of the last evaluation in a file: JSON {domain: loss}, or JSON lines such as `evaluations.jsonl`.

    Raises ShearingError, naming the file, if it cannot be read or lacks a domain.
    """
    if path.suffix == ".json":
        found = read_json(path, "losses")
    else:
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
            found = json.loads(lines[-1])
        except (OSError, ValueError, IndexError, RecursionError) as error:
            raise ShearingError(f"losses {path} cannot be read: {error}") from error
    found = _by_domain(found, set_names)
    missing = [name for name in set_names if not _positive(found.get(name))]
    if missing:
        raise ShearingError(f"{path} has no loss of {missing}; it has {sorted(found)}")
    return [float(found[name]) for name in set_names]


def _by_domain(found: Any, set_names: Sequence[str]) -> dict[str, Any]:
    """The mapping of domains to losses: the object itself, or the one value in it that holds the domains."""
    if not isinstance(found, dict):
        return {}
    nested = [value for value in found.values() if isinstance(value, dict) and set(value) & set(set_names)]
    return nested[0] if nested else found


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LARGEST


def read_models(path: Path) -> tuple[list[float], list[str], np.ndarray]:
    """(sizes [M], set_names [K], losses [M, K]) from a JSON list of {"parameters": N, "losses": {domain: loss}}.

    Raises ShearingError naming every entry that is wrong.
    """
    models = read_json(path, "losses of several sizes", list)
    try:
        names = list(models[0]["losses"])
    except (LookupError, TypeError) as error:
        raise ShearingError(
            f'{path} is no JSON list of {{"parameters": N, "losses": {{domain: loss}}}}: {error!r}'
        ) from error
    problems = []
    for i, model in enumerate(models):
        if not isinstance(model, Mapping) or not _positive(model.get("parameters")):
            problems.append(f"{path}: entry {i} has no positive number in 'parameters'")
        elif not isinstance(model.get("losses"), Mapping) or set(model["losses"]) != set(names):
            problems.append(f"{path}: entry {i} has not the domains {names} of entry 0")
        elif bad := [name for name in names if not _positive(model["losses"][name])]:
            problems.append(f"{path}: entry {i} has no positive loss of {bad}")
    if problems:
        raise ShearingError("\n".join(problems))
    return [m["parameters"] for m in models], names, np.array([[m["losses"][n] for n in names] for m in models])
