"""The Python call: load, choose, fold, measure, write.

    source directory -> model (float32) -> Choice -> fold -> model in the source's dtype -> directory
                          |                            |
                        perplexity before            perplexity after

The directory is a plain Hugging Face model, so methods chain. Beside it: `selection.safetensors` (what was chosen) and
`prune.json` (how, and the table).
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmshearing.checkpoints.hf_config import read_config
from llmshearing.checkpoints.hf_read import as_loaded, load_hf_model, looks_local
from llmshearing.checkpoints.output import check_directory, history_of
from llmshearing.compat import INSTALLED
from llmshearing.errors import ShearingError
from llmshearing.families import FAMILIES, table_for
from llmshearing.families.family import COMMON_LAYERS
from llmshearing.families.names import EXPERTS, HIDDEN, LAYERS, VOCAB
from llmshearing.families.table import EXPERT, Table
from llmshearing.fold.selection import choice_of
from llmshearing.fold.zeros import WHY_NOT, ZEROED
from llmshearing.prune.apply import Result, check_layers, folded, shortened, write, zeroed_in_place
from llmshearing.prune.calibration import SequenceOptions, read_calibration
from llmshearing.prune.energy import norm_energy
from llmshearing.prune.methods import METHODS, Calibration, Choice, Method
from llmshearing.prune.methods.decoder import find_decoder, layer_by_layer
from llmshearing.prune.readers import check_target
from llmshearing.prune.recording import record_prune
from llmshearing.prune.refit import check_refittable
from llmshearing.prune.refit import refit as refit_model
from llmshearing.prune.report import Measures, as_plain, measure, peak_memory, table_of
from llmshearing.prune.targets import DROP, Target, resolve_target
from llmshearing.storage import LazyTensor, open_weights
from llmshearing.storage.dtypes import cast, main_dtype

log = logging.getLogger(__name__)

# Quark's names: they may stand in a target file, as they do in its config.json.
QUARK_NUMBER = "delete_layer_num"
SHARED = (
    "output", "calibration", "device", "save_gpu_memory", "pad", "zero", "overwrite", "refit", "refit_ridge", "check",
)  # fmt: skip
"""Arguments of :func:`prune` that are no method's."""
QUARK_OPTIONS = ("model_decoder_layers", "layer_norm_field", "layer_num_field")


@dataclass(frozen=True)
class Pruned:
    """What came out."""

    path: Path
    before: Measures
    after: Measures
    seconds: float
    """From the start to the written directory."""
    choice: Choice


def prune(
    method: str,
    model: Path | str,
    output: Path | str,
    target: Mapping[str, Any],
    *,
    calibration: Path | str | None = None,
    sequences: SequenceOptions = SequenceOptions(),  # noqa: B008 - frozen
    device: str = "cpu",
    save_gpu_memory: bool = False,
    pad: bool = False,
    zero: bool = False,
    overwrite: bool = False,
    refit: bool = False,
    refit_ridge: float = 0.1,
    check: bool = True,
    **options: Any,
) -> Pruned:
    """Prune a Hugging Face model and write the result as one.

    Args:
        method: one of `llmshearing.prune.methods.METHODS`. model: directory, or name on the hub.
        target: keys of the config that shrink, ``drop_layers``, or ``ratio``; see `llmshearing.prune.targets`.
        calibration: MDS data, JSONL or text; see `llmshearing.prune.calibration`. Without it there is no perplexity.
        device: "cpu", "cuda", ... save_gpu_memory: only one layer at a time is there.
        refit, refit_ridge: fit what stays to what the source says, in closed form; see `llmshearing.prune.refit`.
        check: load what was written and compare it with the model in memory.
        pad: sizes that differ between layers are filled with zeros to the largest, which is exact and saves nothing.
        zero: keep the source's shape, with zeros where units are closed, to be finetuned before it is folded.
        options: the method's own.

    Raises:
        ShearingError: bad input, as the message says; nothing is written then.
    """
    start, output = time.perf_counter(), Path(output)
    check_directory(output, overwrite)
    if Path(model).exists() and output.resolve() == Path(model).resolve():
        raise ShearingError(f"output {output} is the source; give another directory")
    plan = plan_of(method, model, target, {**options, "save_gpu_memory": save_gpu_memory})
    check_target(plan, [INSTALLED])  # the result is built here: a refusal is to come before the work
    data = _calibration(calibration, model, plan.config, sequences)
    if refit:
        _check_refit(plan, data, pad)
    if zero:
        _check_zero(plan, pad, refit)
    if data is None and plan.method.needs_calibration(plan.options):
        raise ShearingError(f"method {method} chooses by sequences: give --calibration (MDS data, JSONL or text)")
    dtypes = _dtypes(model, plan)
    dtype = main_dtype(dtypes)
    source = load_hf_model(model, torch.float32).eval()
    _check_dropped(plan, source)
    table = plan.table if plan.table.tensors else None
    with placed(source, device, plan):
        before = measure(source, dtype, data)
        choice = plan.method.choose(source, table, plan.target.shape, data, **plan.options)
        choice = counting_energy(choice, source, table, data)
    if table:  # a method that parts tied tensors has changed the source's config
        table = table_for(source.config, plan.target.head_mode)
        if zero:
            result = zeroed_in_place(source, table, choice, dtypes)
            choice = replace(choice, selection=choice_of(choice.selection), about={**choice.about, ZEROED: True})
        else:
            result = folded(source, table, choice, dtypes, pad)
        if refit and data is not None:
            choice = _refitted(source, result, table, choice, data, refit_ridge, device)
    else:
        result = shortened(source, plan.table, choice, dtypes)
    with placed(result.model, device, plan):
        after = measure(result.model, dtype, data, choice.reencode)
    split = data.report_name if data is not None else None
    record = {
        **{"method": method, "source": str(model), "target": dict(target), "options": plan.options, "split": split},
        **as_plain(before, after),
        "history": [*history_of(model), f"{method}: {json.dumps(dict(target))}, from {model}"],
    }
    with _tokenizer(model, choice) as tokenizer:
        whole = table or plan.table
        report = partial(record_prune, name=output.resolve().name, table=whole, choice=choice, record=record)
        write(result, output, choice, record, tokenizer=tokenizer, overwrite=overwrite, also=report, check=check)
    seconds = time.perf_counter() - start
    log.info("%s", table_of(before, after, seconds, peak_memory(), split))
    log.info("wrote the pruned model and its selection to %s", output)
    return Pruned(output, before, after, seconds, choice)


def _dtypes(model: Path | str, plan: Plan) -> dict[str, torch.dtype]:
    """Of the stored tensors, by their names in the model."""
    entries: Mapping[str, LazyTensor] = open_weights(model).entries
    if plan.table.tensors:
        entries = as_loaded(model, entries, plan.config, plan.table)
    return {name: tensor.dtype for name, tensor in entries.items()}


def _check_refit(plan: Plan, data: Calibration | None, pad: bool) -> None:
    """Refuse before the work what cannot be refitted."""
    if HIDDEN not in plan.method.sizes and LAYERS not in plan.method.sizes:
        raise ShearingError(f"refit: method {plan.method.name} cuts no units and layers that others could make up for")
    if not plan.table.tensors:
        raise ShearingError("refit: the model has no table that says which tensors read and write hidden states")
    if data is None:
        raise ShearingError("refit needs sequences to fit to: give --calibration (MDS data, JSONL or text)")
    if pad:
        raise ShearingError("refit and pad: padding has to stay 0; refit first, pad the result")
    check_refittable(plan.table)


def _check_zero(plan: Plan, pad: bool, refit: bool) -> None:
    """Refuse before the work what cannot be zeroed; the choice itself is checked when it is there."""
    if not plan.table.tensors:
        raise ShearingError("zero: the model has no table that says which tensors hold the closed units")
    if pad or refit:
        raise ShearingError("zero with pad or refit: a zeroed model keeps its source's shape; finetuning fits it")
    shape = plan.table.shape()
    for size, kind in ((HIDDEN, "hidden"), (EXPERTS, EXPERT), (VOCAB, "vocab")):
        key = plan.table.keys.get(size)
        if key is None or key not in plan.target.shape:
            continue
        wanted = plan.target.shape[key]
        if min(wanted if isinstance(wanted, list) else [wanted]) < shape[key]:
            raise ShearingError(f"cannot be zeroed, only cut: {key}: {WHY_NOT[kind]}")


def _refitted(
    source: PreTrainedModel,
    result: Result,
    table: Table,
    choice: Choice,
    data: Calibration,
    ridge: float,
    device: str,
) -> Choice:
    """Refit the model of ``result``, again in the dtypes to be stored; the choice tells the losses."""
    try:
        source.to(device), result.model.to(device)
        losses = refit_model(source, result.model.eval(), table, choice.selection, data, ridge)
    finally:
        source.to("cpu"), result.model.to("cpu")
    with torch.no_grad():
        for name, value in result.model.state_dict().items():
            value.copy_(cast(name, value, result.dtypes[name]))
    told = {"ridge": ridge, "before": losses.before, "after": losses.after, "kept": losses.kept}
    return replace(choice, about={**choice.about, "refit": told})


def _check_dropped(plan: Plan, source: PreTrainedModel) -> None:
    """Refuse layers that were asked for by number before the work, where a decoder without a table cannot lose them."""
    if plan.table.tensors or plan.target.drop_layers is None:
        return
    decoder = find_decoder(source, plan.options.get("model_decoder_layers"), count_key=plan.table.layers_key)
    kept = [layer for layer in range(plan.table.layers) if layer not in plan.target.drop_layers]
    check_layers(source.config, plan.table, kept, decoder.path)


def counting_energy(
    choice: Choice, source: PreTrainedModel, table: Table | None, data: Calibration | None
) -> Choice:
    """The choice with what lets norms count the energy of the hidden units that stay, where some go.

    Their number is right only where all carry alike. Without sequences nothing better is known.
    """
    if table is None or data is None or "hidden" not in choice.selection.units:
        return choice
    return replace(choice, selection=replace(choice.selection, energy=norm_energy(source, table, data)))


@dataclass(frozen=True)
class Plan:
    """What is going to be done, checked. table: without tensors for a decoder that has no table."""

    method: Method
    config: PretrainedConfig
    table: Table
    target: Target
    options: dict[str, Any]
    one_layer: bool


def plan_of(method: str, model: Path | str, target: Mapping[str, Any], options: Mapping[str, Any]) -> Plan:
    """What :func:`prune` would do with these arguments, whose own options are left out; raises as it does."""
    own = {key: value for key, value in options.items() if key not in SHARED}
    wanted = {"save_gpu_memory": options.get("save_gpu_memory", False), **target}
    return make_plan(method, _config(model), wanted, own)


def make_plan(name: str, config: PretrainedConfig, target: Mapping[str, Any], options: Mapping[str, Any]) -> Plan:
    """Method, table and whole target; raises as :func:`prune`."""
    method, wanted, options = _method(name), dict(target), dict(options)
    one_layer = bool(wanted.pop("save_gpu_memory"))
    if method.any_decoder:
        options |= {key: wanted.pop(key) for key in QUARK_OPTIONS if key in wanted}
    table = _table(config, method, options)
    if QUARK_NUMBER in wanted and method.any_decoder:
        wanted[table.layers_key] = table.layers - wanted.pop(QUARK_NUMBER)
    resolved = resolve_target(wanted, table, method)
    if table.tensors:
        table = table_for(config, resolved.head_mode)
    if resolved.drop_layers is not None:
        options[DROP] = resolved.drop_layers
    return Plan(method, config, table, resolved, options, one_layer)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ShearingError(f"method {name!r} is unknown; there are {', '.join(METHODS)}")
    return METHODS[name]


def _config(model: Path | str) -> PretrainedConfig:
    if looks_local(model) and not (Path(model) / "config.json").is_file():
        raise ShearingError(f"model {model} is no Hugging Face directory: it has no config.json")
    return read_config(model)


def _table(config: PretrainedConfig, method: Method, options: Mapping[str, Any]) -> Table:
    """The family's table; for a decoder without one, a table that knows the number of layers and nothing else."""
    if config.model_type in FAMILIES or not method.any_decoder:
        return table_for(config)
    key = options.get("layer_num_field") or COMMON_LAYERS
    layers = getattr(config, key, None)
    if not isinstance(layers, int):
        numbers = [name for name, value in config.to_dict().items() if "layer" in name and isinstance(value, int)]
        raise ShearingError(f"layer_num_field {key}: the config has no such number; it has {', '.join(numbers)}")
    return Table(config.model_type, layers, kinds={}, axes={}, tensors=(), keys={LAYERS: key}, config_axes={})


def _calibration(
    path: Path | str | None, model: Path | str, config: PretrainedConfig, options: SequenceOptions
) -> Calibration | None:
    if path is None:
        return None
    longest = getattr(config, "max_position_embeddings", None) or 1 << 30
    return read_calibration(path, model, config.vocab_size, longest, options)


@contextmanager
def placed(model: PreTrainedModel, device: str, plan: Plan) -> Iterator[None]:
    """The model on a device, whole or one layer at a time; on the CPU afterwards."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ShearingError(f"device {device}: torch finds no GPU; give --device cpu")
    if plan.one_layer:
        fields = plan.options.get("model_decoder_layers"), plan.options.get("layer_norm_field"), plan.table.layers_key
        with layer_by_layer(model, find_decoder(model, *fields).layers, place):
            yield
        return
    try:
        model.to(place)
        yield
    finally:
        model.to("cpu")


@contextmanager
def _tokenizer(model: Path | str, choice: Choice) -> Iterator[Path | str]:
    """Where the result's tokenizer is."""
    if choice.write_tokenizer is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        choice.write_tokenizer(Path(folder))
        yield folder
