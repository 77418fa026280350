"""The rows: how each chooses, and how it trains on. All of it is options of the commands.

A row cuts by `prune` (or starts from random weights), or learns masks for a part of its tokens and folds them. Then it
trains the compact model for the rest. `compute` counts passes in steps of the whole source: forward 1/3, backward 2/3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.recover.settings import GROUPS, HEADS, HIDDEN, LAYERS, MLP

KL = {"weight": 1.0, "ce": 0.0}
"""Minitron's choice: the divergence from the source alone."""
FOLLOW = {"weight": 1.0, "ce": 0.3, "hidden": 10.0}
"""Divergence, a little cross-entropy, and hidden states with a weight that falls to 0."""


@dataclass(frozen=True)
class Cut:
    """One `llmshearing prune METHOD`."""

    method: str
    sizes: tuple[str, ...] = (HIDDEN, HEADS, GROUPS, MLP, LAYERS)
    """Keys of the target that it cuts to, where the target has them."""
    options: tuple[str, ...] = ()
    """Further ones; {KEY} is a size of the target."""
    passes: float = 0.0
    """Steps of the source a sequence that it chooses by."""


@dataclass(frozen=True)
class Training:
    """One `llmshearing train`."""

    batch: int = 16
    """Sequences a step."""
    lr: float = 1e-3
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the YAML's `optimizer`."""
    distill: Mapping[str, Any] | None = None
    """The YAML's `distill`; the teacher is the source, or with `hidden` the model that the last cut was made of."""
    dynamic: bool = False
    """The mixture moves toward domains far from the source's loss; else all domains alike."""
    share: float = 1.0
    """Of the budget's tokens."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the YAML, dotted."""


@dataclass(frozen=True)
class Row:
    """A recipe."""

    label: str
    training: Training
    cuts: tuple[Cut, ...] = ()
    masks: Training | None = None
    """The stage that learns masks, with the weights."""
    l0: Mapping[str, Any] = field(default_factory=dict)
    """The YAML's `model.l0_module` of that stage, but for the target."""
    scratch: bool = False
    """Keep the shape alone, draw the weights anew."""
    short: Training | None = None
    """In place of `training` for a budget below a million tokens."""

    def recovery(self, budget: int) -> Training:
        """The training of the compact model."""
        return self.short if self.short is not None and budget < 1_000_000 else self.training

    @property
    def seen(self) -> float:
        """Steps of the source that a token to choose by costs."""
        return sum(cut.passes for cut in self.cuts)


TURN = Cut("turn", sizes=(), passes=1 / 3)
RANDOM = Cut("random")
ACTIVATION = Cut("activation", passes=2 / 3)  # width, then the layers' influence
WIDE = Cut("activation", (HIDDEN, LAYERS), passes=2 / 3)
OBS = Cut("obs", (HEADS, GROUPS, MLP), passes=1 / 3)
FISHER = Cut("fisher", passes=1)
REFIT = Cut("fisher", options=("--refit",), passes=2)
BY_OBS = Cut("fisher", options=("--units", "obs", "--refit"), passes=2.5)
STAGE = Training(lr=1e-3, optimizer={"lag_lr": 1.0, "schedule_masks": False}, share=0.25)
PUBLISHED = {"start": "open", "lagrangian_warmup_steps": "0.2dur"}


def _pair(name: str, row: Row) -> dict[str, Row]:
    """A row, and the same with KL alone in every stage."""
    follow = replace(row.training, distill=KL)
    masks = None if row.masks is None else replace(row.masks, distill=KL)
    return {name: row, f"{name}-kl": replace(row, label=f"{row.label}, KL", training=follow, masks=masks)}


PLAIN = Training()
MUON = {"name": "muon", "muon_lr": 3e-3, "weight_decay": 0.0}
OURS = Training(batch=8, lr=2e-3, optimizer=MUON, distill=FOLLOW)
SHORT = Training(batch=4, lr=2e-3, optimizer={**MUON, "muon_lr": 2e-3}, distill={**FOLLOW, "ce": 0.1})
ADAMW = replace(OURS, lr=2.5e-3, optimizer={"betas": [0.9, 0.98], "weight_decay": 0.0})
BEST = (
    Cut("turn", sizes=(), options=("--basis", "output", "--keep", "{hidden_size}"), passes=2),
    REFIT,
)
ROWS: dict[str, Row] = {
    **_pair("scratch", Row("scratch", replace(PLAIN, lr=2e-3), (RANDOM,), scratch=True)),
    **_pair("random", Row("random", PLAIN, (RANDOM,))),
    **_pair("activation", Row("depth + width by activation", PLAIN, (ACTIVATION,))),
    **_pair("obs", Row("OBS after activation", PLAIN, (WIDE, OBS))),
    **_pair("fisher", Row("Fisher", PLAIN, (FISHER,))),
    **_pair("turned", Row("turned Fisher", PLAIN, (TURN, FISHER))),
    "turned-kl": Row("turned Fisher, KL", Training(lr=2e-3, distill=KL), (TURN, FISHER)),
    **_pair("published", Row("learned masks as published", PLAIN, masks=STAGE, l0=PUBLISHED)),
}
INFORMED = {"start": "fisher", "start_samples": 128, "constraint": "exact", "noise": 0.3}
CAREFUL = Training(batch=2, lr=5e-4, optimizer={"lag_lr": 0.03, "schedule_masks": False}, share=0.0375)
FINISHED = Row("the same, trained as ours", OURS, (TURN,), masks=replace(CAREFUL, distill=KL), l0=INFORMED, short=SHORT)
ROWS |= {
    **_pair("masks", Row("learned masks, turned and informed", PLAIN, (TURN,), masks=CAREFUL, l0=INFORMED)),
    "masks-ours": FINISHED,
    "masks-ours-dynamic": replace(
        FINISHED,
        label="the same, dynamic mixture",
        training=replace(OURS, dynamic=True),
        masks=replace(CAREFUL, distill=KL, dynamic=True),
    ),
    "ours-refit": Row("turned Fisher, refit, trained as ours", OURS, (TURN, REFIT), short=SHORT),
    "ours-turned": Row("turned Fisher, trained as ours", OURS, (TURN, FISHER), short=SHORT),
    "ours-adamw": Row("ours with AdamW", ADAMW, BEST),
    "ours": Row("ours: turned by output error, Fisher, refit", OURS, BEST, short=SHORT),
    "ours-obs": Row("ours, intermediate units by OBS", OURS, (BEST[0], BY_OBS), short=SHORT),
    "ours-dynamic": Row("ours, dynamic mixture", replace(OURS, dynamic=True), BEST),
}
DEFAULT = ["scratch", "random", "activation", "activation-kl", "published", "turned-kl", "ours"]
"""What runs where no row is named: two to three hours on two cores."""
