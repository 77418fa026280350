"""The Python call: read, load, adapt, train, merge, fold, write.

    files -> examples ---------------------------+
    directory -> model -> LoRA, masks of zeros --+-> Trainer -> merged -> folded -> directory

On N processes (`torchrun -m llmshearing finetune ...`, `accelerate launch -m llmshearing finetune ...`) each reads and
trains, and the first writes.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llmshearing.checkpoints.hf_config import read_config, without_dropout
from llmshearing.checkpoints.hf_read import as_loaded, load_hf_model
from llmshearing.checkpoints.output import check_directory, history_of
from llmshearing.errors import ShearingError
from llmshearing.evaluate.lm_eval_tasks import need
from llmshearing.evaluate.subjects import load_text_tokenizer
from llmshearing.families import table_for
from llmshearing.families.table import Table
from llmshearing.finetune.adapter import fingerprint, peft, save_adapter, with_adapter, with_stored_adapter
from llmshearing.finetune.options import Options
from llmshearing.finetune.records import Data, read_data
from llmshearing.finetune.training import (
    HELD_OUT,
    begin,
    last_checkpoint,
    make_trainer,
    steps_of,
    training_arguments,
)
from llmshearing.finetune.write import folded_again, folded_dtypes, rounded, write_finetuned
from llmshearing.finetune.zeros import KeepZeros, masks_of, zeroed_selection
from llmshearing.fold.selection import Selection
from llmshearing.storage import open_weights

log = logging.getLogger(__name__)

ALONE = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
LENGTH = 1024
"""Tokens of the longest sequence where none is given."""


@dataclass(frozen=True)
class Where:
    """What is read and written besides the model and the data."""

    output: Path
    tokenizer: Path | str | None = None
    """None: the model's own."""
    adapter: Path | None = None
    """To go on with, or to merge."""
    save_adapter: Path | None = None
    held_out: tuple[Path | str, ...] = ()
    keep_shape: bool = False
    """Write a zeroed model as it is, in place of the folded one."""
    restart: bool = False
    overwrite: bool = False

    @property
    def checkpoints(self) -> Path:
        """Of an unfinished run; gone when it has ended."""
        return self.output.with_name(f"{self.output.name}-checkpoints")


@dataclass(frozen=True)
class Source:
    """The model, and what is to come back as it was."""

    model: PreTrainedModel
    table: Table
    dtypes: dict[str, torch.dtype]
    generation: GenerationConfig | None
    zeroed: Selection | None
    use_cache: bool


def finetune(model: Path | str, data: Sequence[Path | str], options: Options, where: Where) -> Path:
    """Finetune a Hugging Face model, and write the result as one; without data: merge an adapter, fold a zeroed model.

    Raises:
        ShearingError: bad input, as the message says; nothing is written then.
    """
    start = time.perf_counter()
    options.check()
    _check(model, data, options, where)
    accelerate = need("accelerate", "finetune", "training steps") if data else None
    if options.lora is not None or where.adapter is not None:
        peft()
    tokenizer = load_text_tokenizer(str(where.tokenizer or model), str(model))
    examples = _read(model, data, tokenizer, options, where) if data else None
    state = _processes(accelerate, options) if accelerate else None
    set_seed(options.seed)
    source = _load(model)
    base = fingerprint(source.model)
    adapted = _adapted(source, model, options, where)
    figures: dict[str, Any] = {}
    if examples is not None:
        about = {**asdict(options), "model": base, "data": examples.fingerprint, "adapter": str(where.adapter)}
        figures = _train(adapted, source, tokenizer, examples, options, where, about, state)
    if state is None or state.is_main_process:
        if where.save_adapter is not None:
            save_adapter(adapted, where.save_adapter, model, base)
        _write(adapted, source, model, options, where, {**figures, "seconds": time.perf_counter() - start})
        shutil.rmtree(where.checkpoints, ignore_errors=True)
        log.info("wrote the finetuned model to %s", where.output)
    if state is not None and state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
    return where.output


def _processes(accelerate: Any, options: Options) -> Any:
    """What accelerate knows of the other processes, if there are any."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    # Composer leaves the rank of a process that has no others in the environment, without an address; accelerate takes
    # it for a launcher's, and waits to be told where the others are.
    if not started and "MASTER_ADDR" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        for name in ALONE:
            os.environ.pop(name, None)
    return accelerate.PartialState(cpu=options.device == "cpu")


def _check(model: Path | str, data: Sequence[Path | str], options: Options, where: Where) -> None:
    check_directory(where.output, where.overwrite)
    if Path(model).exists() and where.output.resolve() == Path(model).resolve():
        raise ShearingError(f"output {where.output} is the source; give another directory")
    if where.save_adapter is not None:
        if options.lora is None and where.adapter is None:
            raise ShearingError("save_adapter: a full finetuning has no adapter; add --lora")
        if where.save_adapter.exists():
            raise ShearingError(f"save_adapter {where.save_adapter} exists; give another name")
    if where.held_out and options.eval_fraction:
        raise ShearingError("held-out data is given twice: by --eval and by --eval_fraction")
    if not data and where.adapter is None and zeroed_selection(model, read_config(model)) is None:
        raise ShearingError(
            "nothing to do: give files of data to train on, or --adapter DIR to merge "
            f"({model} is no zeroed model to fold)"
        )


def _read(
    model: Path | str,
    data: Sequence[Path | str],
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    where: Where,
) -> Data:
    config = read_config(model)
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    length = options.max_length or min(LENGTH, longest)
    if length > longest:
        raise ShearingError(f"max_length = {length}: {model} reads at most {longest} tokens")
    if len(tokenizer) > config.vocab_size:
        raise ShearingError(f"the tokenizer has {len(tokenizer)} tokens, {model} knows {config.vocab_size}")
    found = read_data(data, where.held_out, tokenizer, length, options.eval_fraction, options.seed)
    counts = found.told()
    log.info(
        "%s sequences of %s tokens, %s of them answers; %s sequences held out",
        *(f"{counts[key]:,}" for key in ("sequences", "tokens", "answer_tokens", "held_out_sequences")),
    )
    return found


def _load(name: Path | str) -> Source:
    """In float32: so weights and updates are exact, whatever the stored dtype."""
    config = without_dropout(read_config(name))
    table = table_for(config)
    zeros = zeroed_selection(name, config)
    stored = as_loaded(name, open_weights(name).entries, config, table)
    dtypes = {key: tensor.dtype for key, tensor in stored.items()}
    dtypes |= {key: dtypes[spec.alias] for key, (spec, _) in table.by_name.items() if spec.alias and key not in dtypes}
    model = load_hf_model(name, torch.float32, config)
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # checkpoints do without; transformers refuses to write some
    use_cache, model.config.use_cache = getattr(model.config, "use_cache", True), False
    selection, own_table = zeros or (None, table)
    return Source(model, own_table, dtypes, generation, selection, use_cache)


def _adapted(source: Source, name: Path | str, options: Options, where: Where) -> Any:
    """The model as it is trained."""
    if where.adapter is not None:
        return with_stored_adapter(source.model, where.adapter, name)
    if options.lora is not None:
        return with_adapter(source.model, source.table, options.lora)
    return source.model


def _train(
    adapted: Any,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    options: Options,
    where: Where,
    about: Mapping[str, Any],
    state: Any,
) -> dict[str, Any]:
    """Train to the end, from the last checkpoint where there is one; the figures."""
    steps = steps_of(options, len(data.train), state.num_processes)
    begun = {**about, "steps": steps, "processes": state.num_processes}
    with state.main_process_first():
        begin(where.checkpoints, begun, where.restart, state.is_main_process)
    held = []
    if source.zeroed is not None:
        held.append(KeepZeros(adapted, masks_of(adapted, source.table, source.zeroed)))
    arguments = training_arguments(options, where.checkpoints, steps, state.num_processes)
    arguments.ddp_find_unused_parameters = source.table.experts is not None
    found = last_checkpoint(where.checkpoints)
    # Not by evaluate(): before train() it leaves a model that accelerate would not wrap for several processes any more.
    arguments.eval_on_start = bool(data.held_out) and found is None
    trainer = make_trainer(adapted, tokenizer, data, options, arguments, held)
    if found is not None:
        log.info("going on from %s", found)
    result = trainer.train(resume_from_checkpoint=str(found) if found is not None else None)
    before, after = _held_out(trainer) if data.held_out else (None, None)
    if before is not None:
        log.info("held-out loss %.4f -> %.4f", before, after)
    for keep in held:
        keep.apply()
    adapted.to("cpu")
    return {
        "data": data.told(),
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "held_out_loss": {"before": before, "after": after},
        "log": trainer.state.log_history,
    }


def _held_out(trainer: Any) -> tuple[float | None, float]:
    """The losses at the beginning and at the end, which may be in the log already."""
    known = {each["step"]: each[HELD_OUT] for each in trainer.state.log_history if HELD_OUT in each}
    last = trainer.state.global_step
    return known.get(0), known[last] if last in known else trainer.evaluate()[HELD_OUT]


def _write(
    adapted: Any, source: Source, name: Path | str, options: Options, where: Where, figures: Mapping[str, Any]
) -> None:
    way = "LoRA" if adapted is not source.model else "full finetuning"
    model = adapted.merge_and_unload() if adapted is not source.model else adapted
    model.requires_grad_(False).eval()
    model.config.use_cache = source.use_cache
    dtypes, selection = source.dtypes, source.zeroed
    rounded(model, dtypes)
    if selection is not None and not where.keep_shape:
        dtypes = folded_dtypes(dtypes, source.table, selection)
        model, selection = folded_again(model, source.table, selection), None
        way += ", folded"
    steps = f" for {figures['steps']} steps" if "steps" in figures else ", nothing trained"
    record = {
        "method": way,
        "source": str(name),
        "options": asdict(options),
        **figures,
        "history": [*history_of(name), f"{way}{steps}, from {name}"],
    }
    write_finetuned(
        model, source.generation, dtypes, where.output, record, tokenizer=where.tokenizer or name, selection=selection,
        overwrite=where.overwrite,
    )  # fmt: skip
