"""The Composer model: a transformers causal LM, gated while it is pruned, and its objective.

    sample gates -> selection -> folded forward -> per-token loss [B, T-1] -> per-sample loss [B] + penalty

One vector of per-sample losses serves the objective, the metrics and every domain's loss. Where the data have a loss
mask, a sample's loss is the mean over the tokens that count, and samples weigh by how many those are.

Shape legend: B sequences, T tokens, V vocabulary, D domains.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from llmshearing.families import table_for
from llmshearing.fold.gating import attach
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.distributed import mark_units
from llmshearing.training.divergence import distillation_losses
from llmshearing.training.hidden import hidden_losses, recorded
from llmshearing.training.loss import batch_mean, predicts, sequence_means, token_losses
from llmshearing.training.targets import Guide

# transformers builds no [B, 1, T, T] mask for an attention that has no mask function of its own; SDPA is then causal,
# which is what packed sequences without padding need.
CAUSAL_SDPA = "causal_sdpa"
AttentionInterface.register(CAUSAL_SDPA, sdpa_attention_forward)


class DomainLoss(Metric):
    """Mean loss over samples, and by domain; summed over batches and ranks. Samples of domain -1 count for nothing.

    With counts it is the mean over tokens that count.

    After :meth:`compute`, ``by_domain`` [D] holds each domain's mean, NaN for a domain without a sample.
    """

    full_state_update = False

    def __init__(self, domains: int, exponentiate: bool = False) -> None:
        super().__init__()
        self.exponentiate = exponentiate
        # One more place, for what belongs to no domain of the list.
        self.add_state("total", torch.zeros(domains + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(domains + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.by_domain: Tensor | None = None

    def update(self, sample_loss: Tensor, domain: Tensor, counts: Tensor | None = None) -> None:
        """sample_loss, domain: [B]; counts [B]: tokens of each that count, None: all samples weigh alike."""
        place = torch.where(domain < 0, len(self.total) - 1, domain)
        weight = torch.ones_like(place, dtype=self.count.dtype) if counts is None else counts.to(self.count.dtype)
        self.total.index_add_(0, place, sample_loss.detach().to(self.total.dtype) * weight)
        self.count.index_add_(0, place, weight)

    def compute(self) -> Tensor:
        total, count = self.total[:-1], self.count[:-1]
        self.by_domain = total / count  # 0 / 0 is NaN: nothing is known of that domain
        mean = total.sum() / count.sum()
        return mean.exp() if self.exponentiate else mean


def learn_every_id(model: PreTrainedModel) -> None:
    """Let the embedding of every id learn, that of ``pad_token_id`` too, which `nn.Embedding` leaves out.

    Training data are packed: there is no padding in them, and an id in them is a token. Many models name their EOS, or
    token 0, as padding; its embedding would stand still while all others learn. The forward pass does not change.
    """
    model.get_input_embeddings().padding_idx = None  # type: ignore[assignment]


class ShearingModel(ComposerModel):
    """Causal LM for Composer; with ``masks`` each training step runs the model that its sampled gates fold to.

    Every id of a batch is a token and learns (:func:`learn_every_id`).

    Args:
        model: a transformers causal LM. With masks its modules are gated in place; state dict keys stay.
        masks: learned masks of ``model``'s table, or None for plain (continued) pretraining.
        domains: number of domains, for the metrics.
        eval_target_model: evaluate at the target shape; else at the size the masks now expect.
        round_to: round the open elements of each axis up to a multiple (extra units have gate 0).
        autocast: dtype of CPU autocast inside forward; Composer itself accepts only float32 on a CPU.
        teacher: what training follows; None: cross-entropy alone. Evaluation is cross-entropy always.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        masks: L0Masks | None = None,
        *,
        domains: int = 1,
        eval_target_model: bool = False,
        round_to: int = 1,
        autocast: torch.dtype | None = None,
        teacher: Guide | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher  # no module: neither trained nor saved
        self.model = model
        self.masks = masks
        self.table = masks.table if masks is not None else table_for(model.config)
        learn_every_id(model)
        # Without masks too: the norms are then the leaner ones of gating.py.
        self.gating = attach(model, self.table)
        self.layers = [*model.get_submodule(self.table.layers_path)]  # a list: they have their place in the model
        mark_units(model, masks)  # after the modules' classes were swapped: sharding swaps them once more
        self.eval_target_model, self.round_to, self.autocast = eval_target_model, round_to, autocast
        self.eval_losses = {
            "LanguageCrossEntropy": DomainLoss(domains),
            "LanguagePerplexity": DomainLoss(domains, exponentiate=True),
        }

    def set_selection(self) -> None:
        """Gate the model for the next forward pass: sampled gates in training, deterministic ones in evaluation."""
        if self.masks is None:
            return
        gates = self.masks.sample() if self.training else self.masks.deterministic(self.eval_target_model)
        self.gating.set(self.masks.selection(gates, self.round_to))

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast is None or device.type != "cpu":
            return nullcontext()
        return torch.autocast("cpu", dtype=self.autocast)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: ``input_ids`` [B, T], and ``loss_mask`` [B, T] where not all of them count.

        Returns ``sample_loss`` [B] (nats per token), the masks' ``penalty``, and with a loss mask ``counts`` [B].
        """
        input_ids, counted = batch["input_ids"], predicts(batch)
        self.set_selection()
        if self.teacher is not None and self.training:
            outputs = self._follow(self.teacher, batch)
        else:
            with self._autocast(input_ids.device):
                logits = self.model(input_ids=input_ids, use_cache=False).logits
            outputs = {"sample_loss": sequence_means(token_losses(logits, input_ids), counted)}
        if counted is not None:
            outputs["counts"] = counted.sum(-1)
        if self.masks is not None and self.training and not self.masks.exact:
            outputs["penalty"] = self.masks.penalty()
        return outputs

    def _follow(self, guide: Guide, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``objective``, ``sample_loss``, ``divergence`` from the guide, and ``hidden`` where states count, all [B]."""
        input_ids, counted = batch["input_ids"], predicts(batch)
        views = None if guide.hidden is None else guide.hidden.views(self.gating.selection)
        own_view, their_view = views or (None, None)
        with self._autocast(input_ids.device):
            with recorded(self.layers, own_view) as states:
                logits = self.model(input_ids=input_ids, use_cache=False).logits
            answer = guide.ask(batch, their_view)
        options = {"weight": guide.weight, "ce": guide.ce, "temperature": guide.temperature}
        losses = distillation_losses(logits, answer.targets, input_ids, **options)
        names = ("objective", "sample_loss", "divergence")
        outputs = {name: sequence_means(loss, counted) for name, loss in zip(names, losses, strict=True)}
        if guide.hidden is not None and views is not None:
            hidden = hidden_losses(states, answer.states, views, counted)
            outputs["objective"] = outputs["objective"] + guide.hidden.weight * hidden
            outputs["hidden"] = hidden.detach()
        return outputs

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Mean objective (cross-entropy where there is no teacher) plus the Lagrangian term."""
        means = outputs.get("objective", outputs["sample_loss"])
        return batch_mean(means, outputs.get("counts")) + outputs.get("penalty", 0.0)

    def eval_forward(self, batch: dict[str, Tensor], outputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As forward; training metrics reuse the outputs of the training step."""
        return outputs if outputs is not None else self.forward(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Evaluation metrics; training losses are reported by a callback from the step's own outputs."""
        return {} if is_train else dict(self.eval_losses)

    def update_metric(self, batch: dict[str, Tensor], outputs: dict[str, Tensor], metric: Metric) -> None:
        domain = batch.get("set")
        domain = torch.zeros_like(batch["input_ids"][:, 0]) if domain is None else domain
        metric.update(outputs["sample_loss"], domain, outputs.get("counts"))
