"""DynamicLoadingCallback: after each evaluation, move the mixture towards the domains that recover slowest."""

from __future__ import annotations

import math
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.data.mixture.mixture import update_proportion
from llmshearing.training.callbacks.losses import evaluated_losses


class DynamicLoadingCallback(Callback):
    """Updates the data set's proportions from the losses of the evaluation that has just ended.

    Losses are summed over ranks before they get here, so that every rank computes the same proportions.

    Args:
        dataset: the training data; holds the proportions. target_loss: by domain, nats per token (doremi).
        dynamic, update_type, eta, c, clamp_excess: as in the configuration's ``callbacks.data_loading``.
    """

    def __init__(
        self,
        dataset: MixtureDataset,
        target_loss: list[float] | None,
        *,
        dynamic: bool = True,
        update_type: str = "doremi",
        eta: float = 1.0,
        c: float = 1e-4,
        clamp_excess: bool = False,
    ) -> None:
        self.dataset, self.target_loss = dataset, target_loss
        self.dynamic, self.update_type = dynamic, update_type
        self.eta, self.c, self.clamp_excess = eta, c, clamp_excess
        # A domain without a sample in an evaluation keeps its last loss.
        self.losses: list[float] = [math.nan] * len(dataset.set_names)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Update and log."""
        now = evaluated_losses(state)
        self.losses = [old if math.isnan(new) else new for old, new in zip(self.losses, now, strict=True)]
        if self.dynamic and self.update_type != "constant" and self.target_loss is not None:
            proportion = update_proportion(
                self.update_type, self.dataset.proportion, self.losses, self.target_loss,
                eta=self.eta, c=self.c, clamp_excess=self.clamp_excess,
            )
            self.dataset.set_proportion(proportion)
        logger.log_metrics(self._metrics())

    def _metrics(self) -> dict[str, float]:
        metrics = {}
        for i, name in enumerate(self.dataset.set_names):
            if not self.dataset.plain:
                metrics[f"mixture/{name}/proportion"] = float(self.dataset.proportion[i])
                metrics[f"mixture/{name}/epoch"] = float(self.dataset.epochs[i])
            if not math.isnan(self.losses[i]):
                metrics[f"mixture/{name}/loss"] = self.losses[i]
                if self.target_loss is not None:
                    metrics[f"mixture/{name}/excess"] = self.losses[i] - self.target_loss[i]
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Last losses and proportions, plain lists."""
        return {"losses": list(self.losses), "proportion": [float(q) for q in self.dataset.proportion]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the mixture where it was."""
        self.losses = list(state["losses"])
        if not self.dataset.plain:
            self.dataset.set_proportion(state["proportion"])
