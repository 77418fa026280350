"""The optimizer of a run: its kind, and its groups of parameters."""

from __future__ import annotations

from typing import Any

import torch

from llmshearing.config import Config
from llmshearing.config.schema import MUON
from llmshearing.families.table import Table
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.muon import Muon, muon_groups
from llmshearing.training.optimizer import FusedDecoupledAdamW
from llmshearing.training.rates import mask_groups

OPTIMIZERS: dict[str, Any] = {"decoupled_adamw": FusedDecoupledAdamW, "adamw": torch.optim.AdamW, MUON: Muon}


def optimizer_groups(model: torch.nn.Module, table: Table, masks: L0Masks | None, cfg: Config) -> list[dict[str, Any]]:
    """Weights, masks and multipliers; only weights decay. The multipliers' ascent stands in the objective."""
    o = cfg.optimizer
    groups: list[dict[str, Any]] = [{"name": "weights", "params": list(model.parameters())}]
    if o.name == MUON:
        groups = muon_groups(model, table, o.lr if o.muon_lr is None else o.muon_lr, o.muon_momentum, o.muon_relative)
    return groups if masks is None else [*groups, *mask_groups(masks, cfg)]


def build_optimizer(groups: list[dict[str, Any]], cfg: Config) -> torch.optim.Optimizer:
    """The optimizer over the groups."""
    o = cfg.optimizer
    options: dict[str, Any] = {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    kind = OPTIMIZERS[o.name]
    return kind(groups, **options, fused=True) if kind is torch.optim.AdamW else kind(groups, **options)
