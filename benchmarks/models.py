"""The contestants: A transformers' dense model, B/S the gated model in training, C the plain model of S's size.

All step with the optimizer of the product. B and S do all that a training step of the product does beside loading data:
masks, penalty, projection, and the callbacks' metrics by domain. Shapes: B sequences of T tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import machine
from llmshearing.families import table_for
from llmshearing.fold.fold import fold
from llmshearing.fold.selection import Selection
from llmshearing.masks.hard_concrete import LOG_ALPHA_MAX
from llmshearing.masks.l0 import L0Masks
from llmshearing.training.callbacks.losses import LossMonitor
from llmshearing.training.callbacks.pruning import PruningCallback
from llmshearing.training.model import CAUSAL_SDPA, ShearingModel
from llmshearing.training.optimizer import FusedDecoupledAdamW

KINDS = ["hidden", "head", "intermediate", "layer"]
TARGET = {"hidden": 256, "head": 4, "intermediate": 688, "layer": 6}
MOSTLY_CLOSED = -4.54  # log alpha of a unit that is open in 5 % of the samples
ROUND_TO = 8  # the default of model.l0_module.round_to


def config(**changes: int) -> LlamaConfig:
    """The judged model: 29 M parameters."""
    sizes = {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376,
        "vocab_size": 4096, "max_position_embeddings": 256,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes}, tie_word_embeddings=False)


def halved(cfg: LlamaConfig) -> dict[str, int]:
    """The target of these benchmarks: half of every width, three quarters of the layers."""
    return {
        "hidden": cfg.hidden_size // 2, "head": cfg.num_attention_heads // 2,
        "intermediate": cfg.intermediate_size // 2, "layer": cfg.num_hidden_layers * 3 // 4,
    }  # fmt: skip


def add_options(parser: argparse.ArgumentParser, batch: int = 16) -> None:
    """Options that these benchmarks share."""
    parser.add_argument("--batch", type=int, default=batch, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="bf16: CPU autocast of all contestants; auto: bf16 where the processor has instructions for it",
    )  # fmt: skip


def autocast_dtype(precision: str) -> torch.dtype | None:
    """dtype of autocast, None for fp32."""
    wanted = precision == "bf16" or (precision == "auto" and machine()["bf16"])
    return torch.bfloat16 if wanted else None


def precision_note(autocast: torch.dtype | None) -> str:
    """What to print beside the numbers."""
    native = bool(machine()["bf16"])
    if autocast is None:
        return "precision fp32" + ("" if native else " (the processor has no bf16 instructions)")
    return "precision bf16 autocast" + ("" if native else ", emulated: the processor has no bf16 instructions")


def random_tokens(cfg: LlamaConfig, batch: int, length: int) -> Tensor:
    return torch.randint(0, cfg.vocab_size, (batch, length))


class Contestant:
    """A model with its optimizer; ``step`` is one training step, ``passes`` forward and backward alone."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        loss: Callable[[Tensor], Tensor],
        after: Callable[[], Any] = lambda: None,
    ) -> None:
        self.loss, self.after = loss, after
        self.optimizer = FusedDecoupledAdamW(groups, lr=1e-4, weight_decay=0.0)

    def passes(self, input_ids: Tensor) -> None:
        self.loss(input_ids).backward()
        self.optimizer.zero_grad()

    def step(self, input_ids: Tensor) -> None:
        self.loss(input_ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after()


def dense(model: LlamaForCausalLM, autocast: torch.dtype | None = None) -> Contestant:
    """A (and C): the model of transformers with its own loss, as people call it."""
    model.train()

    def loss(input_ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            return model(input_ids=input_ids, labels=input_ids).loss

    return Contestant([{"params": list(model.parameters())}], loss)


class Metrics:
    """What the product's callbacks do after every batch, with a logger that forgets."""

    def __init__(self, masks: L0Masks, domains: int) -> None:
        self.domains = domains
        self.callbacks = [LossMonitor([f"domain{i}" for i in range(domains)]), PruningCallback(masks)]
        self.logger: Any = SimpleNamespace(log_metrics=lambda metrics: None)

    def __call__(self, outputs: dict[str, Tensor]) -> None:
        samples = torch.arange(len(outputs["sample_loss"])) % self.domains
        device = SimpleNamespace(_device=torch.device("cpu"))
        state: Any = SimpleNamespace(outputs=outputs, batch={"set": samples}, device=device)
        for event in ("batch_start", "after_loss", "batch_end"):
            for callback in self.callbacks:
                getattr(callback, event)(state, self.logger)


def shearing(
    cfg: LlamaConfig,
    target: dict[str, int],
    domains: int = 1,
    autocast: torch.dtype | None = None,
    lag_lr: float = 0.0,
    round_to: int = ROUND_TO,
) -> tuple[Contestant, ShearingModel]:
    """B, S: the gated model with its masks, multipliers, penalty, metrics. lag_lr: 0 leaves the masks as they are."""
    model = LlamaForCausalLM(cfg)
    model.set_attn_implementation(CAUSAL_SDPA)
    masks = L0Masks(table_for(cfg), KINDS, target)
    sheared = ShearingModel(model, masks, domains=domains, autocast=autocast, round_to=round_to).train()
    metrics, last = Metrics(masks, domains), {}

    def loss(input_ids: Tensor) -> Tensor:
        batch = {"input_ids": input_ids}
        last["outputs"] = sheared(batch)
        return sheared.loss(last["outputs"], batch)

    def after(metrics: Metrics = metrics) -> None:
        masks.project()
        masks.step += 1
        metrics(last["outputs"])

    groups = [{"params": list(model.parameters())}, {"params": list(masks.parameters()), "lr": lag_lr}]
    return Contestant(groups, loss, after), sheared


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
    masks.step = 0  # the same noise each time


def open_fully(model: nn.Module) -> None:
    """Make every sampled gate 1, at the price of sampling it."""
    masks = model.masks
    sample = L0Masks.sample
    masks.sample = lambda: {k: gate + (1 - gate.detach()) for k, gate in sample(masks).items()}  # type: ignore[method-assign,union-attr]


def plain(cfg: LlamaConfig, model: ShearingModel, selection: Selection | None = None) -> LlamaForCausalLM:
    """C: transformers' model with exactly the open counts of a sample, layer by layer, and no gates."""
    masks = model.masks
    if selection is None:
        selection = masks.selection({kind: gate.detach() for kind, gate in masks.sample().items()})
    with torch.no_grad():
        weights = fold(model.model.state_dict(), model.table, selection, zero_closed_blocks=True)
    layers = len(selection.kept_layers(model.table.layers))
    small = LlamaForCausalLM(LlamaConfig.from_dict({**cfg.to_dict(), "num_hidden_layers": layers}))
    for name, tensor in weights.items():
        path, _, parameter = name.rpartition(".")
        setattr(small.get_submodule(path), parameter, nn.Parameter(tensor.detach().clone()))
    return small
