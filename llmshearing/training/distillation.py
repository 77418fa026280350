"""Distillation: a frozen teacher whose logits the student follows (Minitron, arXiv 2407.14679: logits alone).

The teacher is the run's own source, loaded once more while masks train, or any model of the same vocabulary. It takes
no part in the student's parameters, gradients or checkpoints; every rank holds a copy of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmshearing.checkpoints.checkpoint import is_checkpoint, read_checkpoint
from llmshearing.checkpoints.hf_read import load_hf_model
from llmshearing.config import Config
from llmshearing.config.schema import Distill
from llmshearing.errors import ShearingError
from llmshearing.prune.methods.turn import turn_model
from llmshearing.storage import load_weights
from llmshearing.training.source import Source

TOKENIZER = ("tokenizer.json", "tokenizer.model")


class Teacher:
    """A model that is only asked. What weight, ce and temperature do, `llmshearing.training.loss` says."""

    def __init__(self, model: PreTrainedModel, weight: float = 1.0, ce: float = 0.0, temperature: float = 1.0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weight, self.ce, self.temperature = weight, ce, temperature

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T, V]; the model follows the ids to their device."""
        if self.model.device != input_ids.device:
            self.model.to(input_ids.device)
        return self.model(input_ids=input_ids, use_cache=False).logits


def build_teacher(cfg: Config, source: Source) -> Teacher | None:
    """The teacher that ``distill`` asks for; None without it.

    Raises:
        ShearingError: there is no such model, or it has another vocabulary or tokenizer than the run's.
    """
    if cfg.distill is None:
        return None
    asked = cfg.distill
    path = asked.teacher or cfg.model.path
    model = _load(path)
    if path == cfg.model.path and source.basis is not None:  # the student's own source, turned as the student was
        turn_model(model, source.stored_table, source.basis, untie=source.stored is not None)
    own, theirs = source.config.vocab_size, model.config.vocab_size
    if own != theirs:
        raise ShearingError(f"distill.teacher = {path} has vocab_size {theirs}, {cfg.model.path} has {own}; take one")
    recorded = source.checkpoint.info.tokenizer if source.checkpoint is not None else cfg.model.path
    _check_tokenizers(path, cfg.tokenizer_name or recorded)
    return _teacher(model, asked)


def _teacher(model: PreTrainedModel, asked: Distill) -> Teacher:
    return Teacher(model, asked.weight, asked.ce, asked.temperature)


def _load(path: str) -> PreTrainedModel:
    if not is_checkpoint(path):
        return load_hf_model(path, torch.float32)
    checkpoint = read_checkpoint(path)
    if checkpoint.masks:
        raise ShearingError(f"distill.teacher: {path} still has its pruning masks; fold it first")
    model = AutoModelForCausalLM.from_config(checkpoint.info.config, dtype=torch.float32)
    load_weights(model, checkpoint.weights)
    return model


def _check_tokenizers(teacher: str, student: str | None) -> None:
    """Refuse a teacher whose tokenizer is known to be another one, where both are at hand as files."""
    for name in TOKENIZER:
        one, other = Path(teacher) / name, Path(student or "") / name
        if one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes():
            raise ShearingError(f"distill.teacher = {teacher} has another {name} than {student}: ids mean other tokens")
