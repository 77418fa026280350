"""The three contestants: A transformers' dense model, B/S the gated model in training, C the plain model of S's size.

All run under bfloat16 autocast with AdamW. Shapes: B sequences of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmshearing.axes import Selection, fold
from llmshearing.families import table_for
from llmshearing.masks.hard_concrete import LOG_ALPHA_MAX
from llmshearing.masks.l0 import L0Masks
from llmshearing.model import CAUSAL_SDPA, ShearingModel

KINDS = ["hidden", "head", "intermediate", "layer"]
MOSTLY_CLOSED = -4.54  # log alpha of a unit that is open in 5 % of the samples


def config(**changes: int) -> LlamaConfig:
    """The judged model: 29 M parameters."""
    sizes = {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376,
        "vocab_size": 4096, "max_position_embeddings": 256,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes}, tie_word_embeddings=False)


class Contestant:
    """A model with its optimizer; ``step`` is one training step, ``passes`` forward and backward alone."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], after: Callable[[], Any] | None = None):
        self.model, self.loss, self.after = model, loss, after
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def passes(self, input_ids: Tensor) -> None:
        self.loss(input_ids).backward()
        self.optimizer.zero_grad()

    def step(self, input_ids: Tensor) -> None:
        self.loss(input_ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after is not None:
            self.after()


def dense(model: LlamaForCausalLM) -> Contestant:
    """A (and C): the model of transformers with its own loss, as people call it."""

    def loss(input_ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=input_ids, labels=input_ids).loss

    return Contestant(model.train(), loss)


def shearing(cfg: LlamaConfig, target: dict[str, int], domains: int = 1) -> tuple[Contestant, ShearingModel]:
    """B, S: the gated model with its masks, multipliers and penalty."""
    model = LlamaForCausalLM(cfg)
    model.set_attn_implementation(CAUSAL_SDPA)
    masks = L0Masks(table_for(cfg), KINDS, target)
    shearing_model = ShearingModel(model, masks, domains=domains, autocast=torch.bfloat16).train()

    def loss(input_ids: Tensor) -> Tensor:
        batch = {"input_ids": input_ids}
        return shearing_model.loss(shearing_model(batch), batch)

    def after() -> None:
        masks.project()
        masks.step += 1

    return Contestant(shearing_model, loss, after), shearing_model


def close(masks: L0Masks, fraction: float, target: dict[str, int]) -> None:
    """Set log alpha as masks have it on their way: ``fraction`` of the units to close is mostly closed, rest open."""
    with torch.no_grad():
        for kind, values in masks.log_alpha.items():
            rows = masks.rows(kind, values)
            number = round(fraction * (rows.shape[-1] - target[kind]))
            generator = torch.Generator().manual_seed(len(kind))
            order = torch.rand(rows.shape, generator=generator).argsort(-1)
            filled = torch.full_like(rows, LOG_ALPHA_MAX).scatter_(-1, order[..., :number], MOSTLY_CLOSED)
            values.copy_(filled.reshape(values.shape))


def open_fully(model: ShearingModel) -> None:
    """Make every sampled gate 1, at the price of sampling it."""
    masks = model.masks
    sample = L0Masks.sample
    masks.sample = lambda: {k: gate + (1 - gate.detach()) for k, gate in sample(masks).items()}  # type: ignore[method-assign,union-attr]


def plain(cfg: LlamaConfig, model: ShearingModel, selection: Selection) -> LlamaForCausalLM:
    """C: transformers' model with exactly the open counts of a sample, layer by layer, and no gates."""
    with torch.no_grad():
        weights = fold(model.model.state_dict(), model.table, selection, zero_closed_blocks=True)
    layers = len(selection.kept_layers(model.table.layers))
    small = LlamaForCausalLM(LlamaConfig.from_dict({**cfg.to_dict(), "num_hidden_layers": layers}))
    for name, tensor in weights.items():
        path, _, parameter = name.rpartition(".")
        setattr(small.get_submodule(path), parameter, nn.Parameter(tensor.detach().clone()))
    return small
