"""Composer's DecoupledAdamW with torch's fused kernel.

    w <- w (1 - (lr / lr_0) decay)      m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)              lr_0: the learning rate before any schedule

Loshchilov, Hutter 2019 (arXiv:1711.05101). A shearing step updates every weight of the source, also the closed ones.
So this part of the step stays as large while the rest of it shrinks. The fused kernel makes it cheap: it passes once
over weights, gradients and moments, where Composer's own code passes fifteen times. It does not wait for the device
at each parameter.
"""

from __future__ import annotations

import torch
from composer.optim import DecoupledAdamW
from torch import Tensor


class FusedDecoupledAdamW(DecoupledAdamW):
    """Arguments, state and metrics are Composer's. All parameters are on one device. A rate of 0 changes nothing."""

    @staticmethod
    def adamw(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        initial_lr: float,
        weight_decay: float,
        **options: float,
    ) -> None:
        """The functional form that :meth:`step` calls with the parameters of a group."""
        if not params:
            return
        # The kernel multiplies weights by 1 - lr * weight_decay. The formula above has lr / lr_0 in place of lr.
        decay = weight_decay / initial_lr if initial_lr else 0.0
        tensors = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
        torch._fused_adamw_(*tensors, weight_decay=decay, maximize=False, **options)
