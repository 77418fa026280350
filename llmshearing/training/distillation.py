"""Distillation: a frozen teacher whose logits the student follows (Minitron, arXiv 2407.14679: logits alone).

The teacher is the run's own source, loaded once more while masks train, or any model of the same vocabulary. It takes
no part in the student's parameters, gradients or checkpoints. Every rank holds a copy of it, or where the student is
sharded (``fsdp_config``) a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from composer.utils import dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmshearing.checkpoints.checkpoint import is_checkpoint, read_checkpoint
from llmshearing.checkpoints.hf_read import load_hf_model
from llmshearing.config import Config
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.stored import as_stored
from llmshearing.prune.methods.turn import turn_model
from llmshearing.storage import load_weights
from llmshearing.training.cache.codec import Codec
from llmshearing.training.cache.teacher import TOKENIZERS, said_by
from llmshearing.training.distributed import shard_frozen
from llmshearing.training.hidden import HiddenStates, build_hidden, recorded
from llmshearing.training.source import Source
from llmshearing.training.sparse import SAMPLED, content_keys, sparse_targets
from llmshearing.training.targets import Answer, Dense, Guide, View


class Teacher(Guide):
    """A model that is only asked.

    Args:
        model: any model of the student's vocabulary. weight, ce, temperature, hidden: see :class:`Guide`.
        top_k, tail: give sparse targets of so many entries (`llmshearing.training.sparse`); None: the logits.
        sharded: every rank holds a part, and all ask at the same time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weight: float = 1.0,
        ce: float = 0.0,
        temperature: float = 1.0,
        hidden: HiddenStates | None = None,
        *,
        top_k: int | None = None,
        tail: str = SAMPLED,
        sharded: bool = False,
    ) -> None:
        super().__init__(weight, ce, temperature, hidden)
        self.model = model.eval().requires_grad_(False)
        self.sharded, self.placed = sharded, False
        self.top_k, self.tail = top_k, tail

    @cached_property
    def layers(self) -> list[nn.Module]:
        """Its decoder layers."""
        return [*cast(nn.ModuleList, self.model.get_submodule(table_for(self.model.config).layers_path))]

    @torch.no_grad()
    def ask(self, batch: Mapping[str, Tensor], view: View | None = None) -> Answer:
        """See :meth:`Guide.ask`; the model follows the ids to their device."""
        input_ids = batch["input_ids"]
        self._place(input_ids.device)
        with recorded(self.layers if view else (), view) as states:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        if self.top_k is None:
            return Answer(Dense(logits), states)
        targets = sparse_targets(logits, self.top_k, self.tail, content_keys(input_ids), self.temperature)
        codec = Codec(logits.shape[-1], targets.ids.shape[-1], self.tail)
        return Answer(codec.rounded(targets), states)  # to the very bits that a cache would give

    def _place(self, device: torch.device) -> None:
        """Bring the model, or this rank's part of it, to the device, once."""
        if not self.placed and self.sharded:
            shard_frozen(self.model, self.layers, device)
        elif not self.placed:
            self.model.to(device)
        self.placed = True


def build_teacher(cfg: Config, source: Source) -> Teacher | None:
    """The teacher that ``distill`` asks for; None without it.

    Raises:
        ShearingError: there is no such model, or it has another vocabulary or tokenizer than the run's.
    """
    if cfg.distill is None:
        return None
    asked = cfg.distill
    path = asked.teacher or cfg.model.path
    model = load_teacher(path)
    if path == cfg.model.path and source.basis is not None:  # the student's own source, turned as the student was
        turn_model(model, source.stored_table, source.basis, untie=source.stored is not None)
    own, theirs = source.config.vocab_size, model.config.vocab_size
    if own != theirs:
        raise ShearingError(f"distill.teacher = {path} has vocab_size {theirs}, {cfg.model.path} has {own}; take one")
    recorded = source.checkpoint.info.tokenizer if source.checkpoint is not None else cfg.model.path
    _check_tokenizers(path, cfg.tokenizer_name or recorded)
    hidden = build_hidden(asked, model.config, source.table)
    options: dict[str, Any] = {"top_k": asked.top_k, "tail": asked.tail}
    options["sharded"] = cfg.fsdp_config is not None and dist.get_world_size() > 1
    return Teacher(model, asked.weight, asked.ce, asked.temperature, hidden, **options)


def load_teacher(path: str) -> PreTrainedModel:
    """A teacher's model, float32: a Hugging Face directory or name, or a compact checkpoint.

    Raises:
        ShearingError: it cannot be loaded, or has masks.
    """
    if not is_checkpoint(path):
        try:
            return load_hf_model(path, torch.float32)
        except ShearingError as error:
            raise ShearingError(f"distill.teacher = {path}: {error}") from error
    checkpoint = read_checkpoint(path)
    if checkpoint.masks:
        raise ShearingError(f"distill.teacher: {path} still has its pruning masks; fold it first")
    model = as_stored(AutoModelForCausalLM.from_config(checkpoint.info.config, dtype=torch.float32))
    load_weights(model, checkpoint.weights)
    return model


def _check_tokenizers(teacher: str, student: str | None) -> None:
    """Refuse a teacher whose tokenizer is known to be another one, where both are at hand as files."""
    for name in TOKENIZERS:
        one, other = Path(teacher) / name, Path(student or "") / name
        if one.is_file() and other.is_file() and said_by(one) != said_by(other):
            raise ShearingError(f"distill.teacher = {teacher} has another {name} than {student}: ids mean other tokens")
