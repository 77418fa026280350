"""Learning rates of masks and multipliers that follow the length of the stage: `optimizer.lag_lr: auto`.

    T steps of the stage with masks, W of them warm-up (the time over which the sparsity asked for rises)

    masks       8 / W in the warm-up, then at most 0.08       log alpha has about 6 to travel, from 4.5 to below 0
    lambda_2    1000 / T                                      near 1000 at the end, whatever T
    lambda_1    0.01 of that

One rate for all, the published 1.0, is made for 3200 steps. Multipliers grow by about their rate in every step in which
the gap has one sign, both alike: when the sparsity gets to its target, lambda_1 is as large as lambda_2 and has to be
unlearned first, while the masks go past by half their range. A slow lambda_1 does not wind up; a step of at most 0.08
moves a sparsity by at most 0.02. Adam with its usual memory, 10 and 20 steps, turns too late in a warm-up of 20 steps,
and takes the gradient's rise at the start (its factor P(1 - P) grows a hundredfold) for a reason to leap: masks have
betas 0.5 and 0.8.

The constants were searched for by simulation: penalty and masks alone, stages of 40 to 3200 steps, with and without a
pull toward open units (tests/training/test_rates.py has the measure).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmshearing.config import Config
from llmshearing.config.checks import steps_of
from llmshearing.config.values import AUTO
from llmshearing.errors import ShearingError
from llmshearing.masks.l0 import L0Masks

TRAVEL, CALM = 8.0, 0.08
STIFFNESS, SLOW = 1000.0, 0.01
BETAS = (0.5, 0.8)


@dataclass(frozen=True)
class Rates:
    """steps: of the stage. warmup: of its warm-up, 0 or more; in optimizer steps."""

    steps: float
    warmup: float

    def at(self, step: int) -> dict[str, float]:
        """Rate by name of the optimizer's group."""
        travel = TRAVEL / max(1.0, self.warmup)
        stiffness = STIFFNESS / self.steps
        return {
            "masks": travel if step < self.warmup else min(travel, CALM),
            "lambda_1": SLOW * stiffness,
            "lambda_2": stiffness,
        }


def build_rates(cfg: Config) -> Rates | None:
    """The rates that ``lag_lr: auto`` means for this run; None where it is a number, or there are no masks."""
    l0 = cfg.model.l0_module
    if l0 is None or cfg.optimizer.lag_lr != AUTO:
        return None
    steps, warmup = steps_of(cfg, l0.fold_at or cfg.max_duration), steps_of(cfg, l0.lagrangian_warmup_steps or "0ba")
    if steps is None or warmup is None:  # `check_auto_rate` has said so
        raise ShearingError(f"optimizer.lag_lr = {AUTO}: the length of the run is not known in steps")
    return Rates(max(1.0, steps), warmup)


def mask_groups(masks: L0Masks, cfg: Config) -> list[dict[str, Any]]:
    """The optimizer's groups of log alphas and multipliers, without decay."""
    first, second = list(masks.lambda_1.parameters()), list(masks.lambda_2.parameters())
    groups: list[dict[str, Any]] = [{"name": "masks", "params": list(masks.log_alpha.parameters())}]
    if (rates := build_rates(cfg)) is None:
        groups += [{"name": "multipliers", "params": [*first, *second]}] if first else []
        return [{**group, "lr": cfg.optimizer.lag_lr, "weight_decay": 0.0} for group in groups]
    groups[0]["betas"] = BETAS
    groups += [{"name": "lambda_1", "params": first}, {"name": "lambda_2", "params": second}] if first else []
    return [{**group, "lr": rates.at(0)[group["name"]], "weight_decay": 0.0} for group in groups]
