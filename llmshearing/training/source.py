"""The source of a run: its config, table, weights and masks, from the resolved configuration."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmshearing.checkpoints.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from llmshearing.checkpoints.hf_config import read_config, without_dropout
from llmshearing.checkpoints.hf_read import load_hf_model
from llmshearing.config import Config, complete, disagreements, head_mode, source_shape, target_problems, target_shape
from llmshearing.config.shapes import FACTS
from llmshearing.errors import ShearingError
from llmshearing.families import DEFAULT, table_for
from llmshearing.families.names import BLOCK_MASKS as BLOCK_KINDS
from llmshearing.families.names import HEAD_DIM
from llmshearing.families.nonuniform.config import config_of
from llmshearing.families.stored import as_stored
from llmshearing.families.table import Table
from llmshearing.fold.fold import config_of_shape
from llmshearing.fold.turn import HIDDEN, check_tied, check_turnable
from llmshearing.masks.l0 import L0Masks
from llmshearing.prune.methods.turn import OUTPUT, turn_model
from llmshearing.prune.refit import check_refittable
from llmshearing.storage import load_weights
from llmshearing.training.distributed import reads_source
from llmshearing.training.empty import parameters_on_meta

log = logging.getLogger(__name__)


@dataclass
class Source:
    """What a run starts from. ``target``: shape in the config's keys, None without masks or with a sparsity only."""

    config: PretrainedConfig
    table: Table
    head_mode: str
    target: dict[str, int] | None
    checkpoint: Checkpoint | None
    stored: PretrainedConfig | None = None
    """Config of the stored weights, where turning them parts a head from its embedding; None: ``config``."""
    basis: Tensor | None = None
    """What hidden units are turned by whenever the weights are loaded; None: nothing."""
    same_run: bool = False
    """Whether ``checkpoint`` is of the very run that trains this, which has folded itself."""

    @property
    def stored_table(self) -> Table:
        """The table of the stored weights."""
        return self.table if self.stored is None else table_for(self.stored, self.head_mode)

    def target_parameters(self) -> int | None:
        """Parameters of the model of the target's shape, embeddings and all."""
        if self.target is None:
            return None
        return table_for(config_of(config_of_shape(self.config.to_dict(), self.table, self.target))).count()


def read_source(cfg: Config) -> Source:
    """Config, table and target of a run; loads no weights of a Hugging Face directory.

    Raises:
        ShearingError: the source cannot be found or read, or the target does not fit it.
    """
    checkpoint = read_checkpoint(cfg.model.path) if is_checkpoint(cfg.model.path) else None
    if checkpoint is not None and checkpoint.masks:
        raise ShearingError(
            f"model.path: {cfg.model.path} is a pruning run's checkpoint with masks. To go on with that run use "
            "load_path or autoresume; to train the pruned model fold it first: python3 -m "
            f"llmshearing.utils.post_pruning_processing prune_and_save_model {cfg.model.path}"
        )
    hf_config = without_dropout(_hf_config(cfg, checkpoint))
    table = table_for(hf_config)
    shape = complete(table.sizes())
    problems = [*disagreements(cfg, hf_config.to_dict(), cfg.model.path), *target_problems(cfg, shape)]
    if problems := [*problems, *turn_problems(cfg, table), *refit_problems(cfg, table)]:
        raise ShearingError("\n".join(problems))
    stored = None
    if cfg.model.turn is not None and any(spec.alias for spec in table.tensors):
        stored, hf_config = hf_config, _untied(hf_config)
        table = table_for(hf_config)
    mode = head_mode(cfg, shape)
    target = None
    if (wanted := target_shape(cfg, shape)) is not None:
        sizes = asdict(wanted)
        target = {key: sizes[size] for size, key in table.keys.items() if size != HEAD_DIM}
        target = {key: number for key, number in {**table.shape(), **target}.items() if number is not None}
        if problems := table.shape_problems(target):
            raise ShearingError("model.l0_module.target_model: " + "\n".join(problems))
    return Source(hf_config, table_for(hf_config, mode), mode, target, checkpoint, stored)


def _hf_config(cfg: Config, checkpoint: Checkpoint | None) -> PretrainedConfig:
    if checkpoint is not None:
        return checkpoint.info.config
    if (Path(cfg.model.path) / "config.json").is_file():
        config = read_config(cfg.model.path)
    elif (shape := source_shape(cfg)) is not None:
        # The weights are elsewhere (a recipe looked at on a laptop): the YAML's keys say the shape.
        facts = {key: getattr(cfg.model, key) for key in FACTS}
        sizes = {DEFAULT.keys[size]: number for size, number in asdict(shape).items() if size in DEFAULT.keys}
        given = {**sizes, **{key: value for key, value in facts.items() if value is not None}}
        config = AutoConfig.for_model(DEFAULT.name, **given, max_position_embeddings=cfg.max_seq_len)
    else:
        try:
            config = read_config(cfg.model.path)
        except ShearingError as error:
            said = f"model.path = {cfg.model.path}: no such directory, checkpoint or model: {error}"
            raise ShearingError(said) from None
    config.return_dict = True  # outputs are asked for by name
    return config


def load_model(source: Source, cfg: Config) -> PreTrainedModel:
    """The transformers model with float32 weights, every tensor found and none left over.

    Under FSDP only the first rank reads them (:func:`~llmshearing.training.distributed.reads_source`); the others'
    parameters are on the meta device until Composer hands them their shards.

    Raises:
        ShearingError: weights are missing, unexpected or of another shape.
    """
    attention = cfg.model.attn_implementation or "sdpa"
    stored = copy.deepcopy(source.stored or source.config)
    if not reads_source(cfg):
        with parameters_on_meta():  # parameters only: buffers, such as the rotary frequencies, are computed
            model = as_stored(AutoModelForCausalLM.from_config(source.config, dtype=torch.float32))
        model.tie_weights()  # every parameter became one of its own
    elif source.checkpoint is not None:
        model = as_stored(AutoModelForCausalLM.from_config(stored, dtype=torch.float32))
        load_weights(model, source.checkpoint.weights)
    else:
        model = load_hf_model(cfg.model.path, torch.float32, stored)
    if source.basis is not None and reads_source(cfg):
        turn_model(model, source.stored_table, source.basis, untie=source.stored is not None)
    model.set_attn_implementation(_attention(attention, model))
    if cfg.model.activation_checkpointing:
        # Gates are shared between layers: only the non-reentrant form recomputes them rightly.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _attention(attention: str, model: PreTrainedModel) -> str:
    """The implementation that a run takes: SDPA without a mask where none is needed, eager where there is none."""
    from llmshearing.training.model import CAUSAL_SDPA

    if attention != "sdpa":
        return attention
    if not model._supports_sdpa:  # a soft cap of attention scores, to which SDPA has no place
        log.info("attention is eager: transformers does not compute %s with sdpa", type(model).__name__)
        return "eager"
    windowed = getattr(model.config, "sliding_window", None) is not None
    return attention if windowed else CAUSAL_SDPA


def turn_problems(cfg: Config, table: Table) -> Iterator[str]:
    """What keeps a source of this table from being turned, as far as that can be told without its weights."""
    turn, max_seq_len = cfg.model.turn, cfg.max_seq_len
    if turn is None:
        return
    key = "model.turn"
    for check in (check_turnable, partial(check_tied, untie=turn.untie)):
        try:
            check(table)
        except ShearingError as error:
            yield f"{key}: {error}".replace("Say --untie", f"Say {key}.untie=true")
    tokens, size = turn.samples * max_seq_len, table.axes[HIDDEN].length
    target = cfg.model.l0_module.target_model if cfg.model.l0_module is not None else None
    if turn.basis == OUTPUT and not 0 < (target.d_model or 0 if target is not None else 0) < size:
        yield (
            f"{key}.basis = {OUTPUT} is made for a number of hidden units that stay: give "
            f"model.l0_module.target_model.d_model, below {size}, or take energy"
        )
    if tokens < size:
        yield (
            f"{key}.samples = {turn.samples} of max_seq_len = {max_seq_len}: {tokens:,} tokens cannot tell {size:,} "
            f"directions apart; give at least {-(-size // max_seq_len)}"
        )


def refit_problems(cfg: Config, table: Table) -> Iterator[str]:
    """What keeps a compact model of this table from being refitted."""
    if cfg.model.l0_module is None or not cfg.model.l0_module.refit:
        return
    try:
        check_refittable(table)
    except ShearingError as error:
        yield f"model.l0_module.refit: {error}"


def kept_units(source: Source) -> int | None:
    """Hidden units of the target; None where there is none."""
    return None if source.target is None else source.table.units(source.target)[HIDDEN]


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the same model with a head of its own."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def build_masks(source: Source, cfg: Config) -> L0Masks | None:
    """Masks as ``model.l0_module`` asks for them; None without it."""
    l0 = cfg.model.l0_module
    if l0 is None:
        return None
    target = None
    if source.target is not None:
        units = source.table.units(source.target)
        layers = source.target[source.table.layers_key]
        target = {kind: layers if kind in BLOCK_KINDS else units[kind] for kind in l0.pruning_modules}
    sparsity = l0.target_sparsity if target is None else None
    return L0Masks(
        source.table, l0.pruning_modules, target, sparsity, l0.start_sparsity, l0.seed, l0.constraint, l0.noise
    )


def mask_info(masks: L0Masks | None, head_mode: str) -> dict[str, Any] | None:
    """What a checkpoint says of its masks."""
    if masks is None:
        return None
    return {
        "kinds": list(masks.kinds),
        "target": masks.target,
        "target_sparsity": masks.target_sparsity,
        "start_sparsity": masks.start_sparsity,
        "seed": masks.seed,
        "constraint": masks.constraint,
        "noise": masks.noise,
        "energy": masks.energy is not None,
        "head_mode": head_mode,
    }
