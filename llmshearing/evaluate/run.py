"""The Python call: load each model, measure, compare, write.

    models -> subjects -> cost -> loss by domain -> tasks -> speed (all in turn) -> remarks -> JSON, CSV, plot, table

Models are loaded one after another; only speed has all of them in memory, since it takes turns.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmshearing.checkpoints.hf_read import DTYPES
from llmshearing.errors import ShearingError
from llmshearing.evaluate.lm_eval_tasks import TaskSpec, need, read_tasks, run_tasks
from llmshearing.evaluate.perplexity import WIDEST, LossOptions, measure_losses
from llmshearing.evaluate.remarks import remarks
from llmshearing.evaluate.results import JSON_FILE, write_results
from llmshearing.evaluate.speed import SpeedOptions, measure_speed
from llmshearing.evaluate.subjects import Subject, short_names, subjects_of
from llmshearing.evaluate.texts import Data, TokenDomains, open_data
from llmshearing.families.cost import cost_of
from llmshearing.prune.flops import close, counted_flops
from llmshearing.report.record import versions

log = logging.getLogger(__name__)

FORMAT = "llmshearing-evaluation-1"
CHECKED = 16
"""Tokens of the sequence that the closed form is compared with torch's counter on."""


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    source: str | None = None
    """The model that the others were made from: they are compared with it."""
    data: Sequence[str] = ()
    text_field: str = "text"
    split: str | None = None
    loss: LossOptions = LossOptions()
    tasks: Sequence[str] = ()
    limit: int | None = None
    """Items of each task."""
    num_fewshot: int | None = None
    speed: SpeedOptions | None = SpeedOptions()
    """None: it is not measured."""
    tokenizer: str | None = None
    """In place of each model's own."""
    dtype: str = "float32"
    device: str = "cpu"
    length: int | None = None
    """Tokens of the sequence that FLOPs are told for; None: the window of the losses."""


@dataclass(frozen=True)
class Inputs:
    """What is read before the first model is loaded."""

    subjects: list[Subject]
    data: Data | None
    tasks: list[TaskSpec]


def evaluate(
    models: Sequence[str], options: Options, output: Path | str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Evaluate models side by side; plain data, as it is written to `evaluation.json`.

    Args:
        models: Hugging Face directories or names, and checkpoints. output: directory for the files; None: none.

    Raises:
        ShearingError: bad input, as the message says; nothing is written then.
    """
    if output is not None and (Path(output) / JSON_FILE).exists() and not overwrite:
        raise ShearingError(f"{Path(output) / JSON_FILE} exists; give another --output, or --overwrite")
    inputs = _read(models, options)
    found = [_measure(subject, inputs, options) for subject in inputs.subjects]
    if options.speed is not None:
        timed = _speed(inputs.subjects, options, options.speed)
        found = [{**each, "speed": timed[each["name"]]} for each in found]
    source = next((each for each in found if each["is_source"]), None)
    found = [{**each, "remarks": remarks(each, source)} for each in found]
    result = {
        "format": FORMAT,
        "source": source["name"] if source else None,
        "dtype": options.dtype,
        "device": _device(options.device),
        "versions": versions(),
        "models": found,
    }
    if output is not None:
        write_results(result, Path(output))
    return result


def _read(models: Sequence[str], options: Options) -> Inputs:
    if options.dtype not in DTYPES:
        raise ShearingError(f"dtype {options.dtype!r}: must be one of {', '.join(DTYPES)}")
    tasks = read_tasks(options.tasks)
    if tasks:
        need("lm_eval.models.huggingface")
    data = open_data(options.data, options.text_field, options.split) if options.data else None
    paths = list(dict.fromkeys([*([options.source] if options.source else []), *models]))
    subjects = [subject for path in paths for subject in subjects_of(path, options.tokenizer)]
    names = short_names([subject.name for subject in subjects])
    subjects = [replace(subject, name=name) for subject, name in zip(subjects, names, strict=True)]
    if tasks or (data is not None and not isinstance(data, TokenDomains)):
        for subject in subjects:  # before the work: each has to have one
            subject.tokenizer()
    return Inputs(subjects, data, tasks)


def _measure(subject: Subject, inputs: Inputs, options: Options) -> dict[str, Any]:
    log.info("%s: %s", subject.name, subject.kind)
    found: dict[str, Any] = {
        "name": subject.name,
        "path": subject.path,
        "kind": subject.kind,
        "is_source": subject.path == options.source,
        "shape": subject.shape(),
    }
    model = _load(subject, options)
    found |= _cost(subject, model, options)
    tokenizer = _tokenizer(subject)
    if inputs.data is not None:
        found["loss"] = measure_losses(model, tokenizer, inputs.data, options.loss, subject.name)
    if inputs.tasks and tokenizer is not None:
        found["tasks"] = run_tasks(
            model, tokenizer, inputs.tasks, batch_size=options.loss.batch_size, limit=options.limit,
            num_fewshot=options.num_fewshot, bos=options.loss.bos,
        )  # fmt: skip
    return found


def _load(subject: Subject, options: Options) -> PreTrainedModel:
    try:
        return subject.load(DTYPES[options.dtype]).to(options.device).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or too little memory on it
        raise ShearingError(f"{subject.path} on device {options.device}: {error}") from error


def _tokenizer(subject: Subject) -> PreTrainedTokenizerBase | None:
    """None where it has none: sequences of ids need none."""
    try:
        return subject.tokenizer()
    except ShearingError as error:
        log.warning("warning: words and bytes are not counted: %s", error)
        return None


def _cost(subject: Subject, model: PreTrainedModel, options: Options) -> dict[str, Any]:
    """Parameters, bytes, FLOPs and the cache."""
    longest = getattr(model.config, "max_position_embeddings", None) or WIDEST
    length = options.length or options.loss.window or min(WIDEST, longest)
    counted = counted_flops(model, min(CHECKED, longest))
    if subject.table is None:
        short = counted_flops(model, 2)
        # Twice the tokens: twice the matrices, four times the attention.
        per_pair = (counted_flops(model, 4) - 2 * short) / (16 - 8)
        total, kv, parameters = (short / 2 - 2 * per_pair) * length + per_pair * length**2, None, model.num_parameters()
    else:
        cost = cost_of(subject.table)
        total, kv = cost.sequence(length), cost.kv_elements * DTYPES[options.dtype].itemsize
        parameters = subject.table.count()
        if not close(closed := cost.sequence(min(CHECKED, longest)), counted):
            log.warning(
                "warning: %s: FLOPs are %s by its table, and %s as torch counts them", subject.name, closed, counted
            )
    return {
        "parameters": parameters,
        "stored_bytes": subject.stored_bytes,
        "flops": {
            "length": length,
            "per_sequence": total,
            "per_token": total / length,
            "checked": {"length": min(CHECKED, longest), "counted": counted},
        },
        "kv_cache_bytes_per_token": kv,
    }


def _speed(subjects: Sequence[Subject], options: Options, speed: SpeedOptions) -> dict[str, dict[str, Any]]:
    models = {subject.name: _load(subject, options) for subject in subjects}
    return measure_speed(models, speed)


def _device(name: str) -> str:
    kind = torch.device(name)
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
