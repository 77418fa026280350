"""How many units OBS removes of every layer: the same everywhere, or more with depth.

    log_increase (SlimGPT):  ratio of the i-th of n layers = low + (high - low) ln(i + 1) / ln(n),  i = 0 .. n - 1

SlimGPT gives low and high, for 32 layers. Here low and the mean are given, for any number of layers; high follows.
"""

from __future__ import annotations

import math

from llmshearing.errors import ShearingError

UNIFORM, LOG_INCREASE = "uniform", "log_increase"
STRATEGIES = (UNIFORM, LOG_INCREASE)
# Ratio of the first layer, in parts of the mean: SlimGPT's 0.0625 for 0.2.
FIRST = 0.3125


def layer_ratios(strategy: str, mean: float, layers: int, low: float | None = None, high: float = 1.0) -> list[float]:
    """Ratio to remove of each of ``layers`` layers, with the mean asked for.

    Args:
        low: of the first layer; None: FIRST of the mean. high: the most that a layer may lose. If the last layer would
            lose more, it loses this, and the first layers lose more instead.
    """
    if strategy == UNIFORM or layers == 1:
        return [mean] * layers
    rise = [math.log(i + 1) / math.log(layers) for i in range(layers)]
    middle = sum(rise) / layers
    low = FIRST * mean if low is None else low
    last = low + (mean - low) / middle
    if last > high:
        last = max(high, mean)
        low = (mean - last * middle) / (1 - middle)
    return [low + (last - low) * at for at in rise]


def layer_counts(strategy: str, units: int, remove: int, layers: int, low: float | None = None) -> list[int]:
    """Units to remove of each layer: ``remove`` of ``units`` on average, exactly; at least one unit stays in each.

    Raises:
        ShearingError: ``low`` is above the mean ratio.
    """
    if low is not None and low > remove / units:
        raise ShearingError(f"min_ratio {low} is above the target's mean ratio {remove / units:.4f}")
    ratios = layer_ratios(strategy, remove / units, layers, low, high=1 - 1 / units)
    exact = [ratio * units for ratio in ratios]
    counts = [min(units - 1, math.floor(value + 1e-9)) for value in exact]
    by_remainder = sorted(range(layers), key=lambda layer: counts[layer] - exact[layer])
    for layer in by_remainder[: remove * layers - sum(counts)]:
        counts[layer] += 1
    return counts


def check_options(
    layers: int, minlayer: int, maxlayer: int, strategy: str, min_ratio: float | None, percdamp: float
) -> None:
    """Raises ShearingError naming every option that does not fit."""
    problems = []
    if not 0 <= minlayer < maxlayer <= layers:
        problems.append(f"minlayer {minlayer}, maxlayer {maxlayer}: must be 0 <= minlayer < maxlayer <= {layers}")
    if strategy not in STRATEGIES:
        problems.append(f"ratios {strategy!r}: must be one of {', '.join(STRATEGIES)}")
    if min_ratio is not None and not (strategy == LOG_INCREASE and 0 <= min_ratio < 1):
        problems.append(f"min_ratio {min_ratio}: must be from 0 to the mean ratio, with ratios {LOG_INCREASE}")
    if not percdamp >= 0:
        problems.append(f"percdamp {percdamp}: must be 0 or more, a part of the Hessian's mean diagonal")
    if problems:
        raise ShearingError("\n".join(problems))
